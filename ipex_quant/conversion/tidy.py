"""Simplifying a model before quantization: dropout and BatchNorm are removed, and fast paths that skip layers."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..nn.dropout import replace_dropout_with_identity
from ..nn.linears import is_convolution
from ..nn.multihead_attention import is_split_attention
from ..smoothquant.tracing import trace_groups
from .example import Example

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def drop_dropout(model: nn.Module) -> None:
    """Replace every dropout inside `model` by an identity, and give split attention the dropout probability 0."""
    replace_dropout_with_identity(model, for_training=True)
    for module in model.modules():
        if is_split_attention(module):
            module.dropout = 0.0


def leave_fast_paths(model: nn.Module, layers: Collection[str]) -> None:
    """Disable torch's fast path of each ``nn.TransformerEncoderLayer`` that contains one of the linear `layers`.

    In evaluation mode the fast path passes the layers' weights to a native op of torch instead of calling the layers,
    and ``nn.TransformerEncoder`` makes nested tensors of padded inputs for that op.
    """
    parents = {name.rpartition(".")[0] for name in layers}
    parents |= {name.rpartition(".")[0] for name in parents if is_split_attention(model.get_submodule(name))}
    changed = {model.get_submodule(name) for name in parents}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and module in changed:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and not changed.isdisjoint(module.layers):
            module.use_nested_tensor = False


def fold_batch_norms(model: nn.Module, layers: Collection[str], example: Example) -> None:
    """Fold each BatchNorm in evaluation mode into the one of `layers` whose output it alone reads, if there is one."""
    norms = {
        name
        for name, module in model.named_modules()
        if isinstance(module, _BATCH_NORMS) and not module.training and module.running_mean is not None
        if not (module._forward_hooks or module._forward_pre_hooks)
    }
    if not norms:
        return
    for group in trace_groups(model, norms, layers, partial(example.run, model)):
        if group.producer is None or len(group.members) > 1:
            continue
        layer = model.get_submodule(group.producer)
        # In 3-D inputs the channels of BatchNorm1d are dimension 1, those of a linear layer dimension 2.
        if is_convolution(layer) or (isinstance(layer, nn.Linear) and group.rank == 2):
            fold_batch_norm(model, group.producer, group.members[0], nn.Identity())


def fold_batch_norm(model: nn.Module, layer: str, norm: str, successor: nn.Module) -> None:
    """Fold the BatchNorm named `norm` into the named `layer`, and put `successor` in its place."""
    fused = _fused(model.get_submodule(layer), model.get_submodule(norm))
    _replace(model, layer, fused)
    _replace(model, norm, successor.eval())


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module:
    fuse = fuse_conv_bn_eval if is_convolution(layer) else fuse_linear_bn_eval
    training = layer.training
    with torch.no_grad():
        return fuse(layer.eval(), norm).train(training)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    old = model.get_submodule(name)
    for each, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(each, new)
