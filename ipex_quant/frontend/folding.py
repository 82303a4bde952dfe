"""Folding BatchNorms into the convolutions and linear layers before them, with or without an example of inputs."""

from __future__ import annotations

import torch
from torch import nn

from ..conversion.example import Example
from ..conversion.tidy import fold_batch_norm
from .parts import sole_readers

_BATCH_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
"""The BatchNorm for the outputs of each convolution."""


class FoldedBatchNorm(nn.Identity):
    """Stands where a BatchNorm was that is folded into a linear layer, of which its channels are the features.

    Raises AssertionError for inputs of more than two dimensions, whose channels are not.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(
            x.dim() == 2, "a BatchNorm was folded for inputs of 2 dimensions: optimize with linear_bn_folding=False"
        )
        return x


def fold(model: nn.Module, convolutions: bool, linears: bool, example: Example | None) -> None:
    """Fold each BatchNorm of `model` in evaluation mode into the layer whose output it alone reads, in place.

    `convolutions` and `linears` say which layers to consider. Layers with hooks stay.
    """
    kinds = (*(_BATCH_NORMS if convolutions else ()), *((nn.Linear,) if linears else ()))
    layers = {name for name, module in model.named_modules() if type(module) in kinds and _is_plain(module)}
    norms = {
        name
        for name, module in model.named_modules()
        if type(module) in _BATCH_NORMS.values() and _is_plain(module) and module.running_mean is not None
    }
    for pair in sole_readers(model, layers, norms, example):
        successor = _successor(model.get_submodule(pair.producer), model.get_submodule(pair.reader), pair.rank)
        if successor is not None:
            fold_batch_norm(model, pair.producer, pair.reader, successor)


def _is_plain(module: nn.Module) -> bool:
    return not (module.training or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _successor(layer: nn.Module, norm: nn.Module, rank: int | None) -> nn.Module | None:
    """What to put in the place of `norm` when it is folded into `layer`; None if it cannot be."""
    if not isinstance(layer, nn.Linear):
        return nn.Identity() if type(norm) is _BATCH_NORMS[type(layer)] else None
    if norm.num_features == 1:  # all values are scaled alike
        return nn.Identity()
    # In more than two dimensions, the channels of a BatchNorm are not the features of a linear layer.
    if type(norm) is not nn.BatchNorm1d or norm.num_features != layer.out_features or rank not in (None, 2):
        return None
    return FoldedBatchNorm()
