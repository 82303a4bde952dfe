"""`ipex_quant.quantization.rotate`: rotate what a decoder's layers hand on, so that it has no outliers.

An RMSNorm commutes with an orthogonal matrix once its gain is in the linears that read it. So the embedding and all
linears that write to the residual stream can write it rotated, and all that read it rotate back, in their weights
alone: the model computes the same, but features with outliers are spread over all others, and quantization to a common
scale loses less.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn.embeddings import is_embedding
from ..nn.linears import holds_experts, is_linear, linear_shape, oriented, output_head
from ..nn.modes import evaluating
from ..nn.norms import is_norm
from ..smoothquant.tracing import trace_groups
from ..woq.hadamard import random_rotation
from .tying import untie

_TOLERANCE, _ROUNDED_TOLERANCE = 1e-3, 0.1
"""Largest change of the logits, relative, by which a rotated model still counts as the same: in float32, and else."""

_LARGE = 2.0**20
"""An input beside which the epsilon of a norm is nothing."""


@torch.no_grad()
def rotate(
    model: nn.Module, example_kwarg_inputs: Mapping[str, Any] | None = None, seed: int = 0, inplace: bool = False
) -> nn.Module:
    """Return `model`, a float decoder of transformers, with its residual stream rotated by a random orthogonal matrix.

    It computes the same; activations quantized to few scales are far more exact afterwards. Weights are rounded to
    their dtype once more: rotate a float32 model. An output layer that is tied to the embedding gets a weight of its
    own, since it alone takes in the gain of the last norm. Hidden states of the model are rotated ones.
    `example_kwarg_inputs` are arguments of the model, by default a few tokens. Without `inplace` the model is copied.

    Raises ValueError, and leaves the model as it was, where norms do not allow it (LayerNorms, norms of what is
    added to the stream), for experts in 3-D parameters, and for layers that the example does not
    reach: a run of the rotated model must give the same logits.

    Source: Ashkboos et al., "SliceGPT", arXiv 2401.15024; "QuaRot", arXiv 2404.00456, without its online rotations.
    """
    model = model if inplace else copy.deepcopy(model)
    inputs = {"use_cache": False, **(example_kwarg_inputs or {"input_ids": torch.arange(8).unsqueeze(0)})}
    with evaluating(model):
        stream = _Stream.of(model, inputs)
        before = model(**inputs).logits.float()
        old = {parameter: parameter.data for parameter in model.parameters()}
        head = model.get_submodule(stream.head)
        tied = head._parameters["weight"] is model.get_submodule(stream.embedding)._parameters["weight"]
        shared = head.weight
        if tied:
            head.weight = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        try:
            stream.turn(model, random_rotation(stream.size, seed))
            after = model(**inputs).logits.float()
            change = float((after - before).norm() / before.norm())
            if not change <= (_TOLERANCE if head.weight.dtype == torch.float32 else _ROUNDED_TOLERANCE):
                raise ValueError(
                    f"{type(model).__name__}: its norms do not allow a rotation, the logits change by {change:.1%}; "
                    "quantize it as it is"
                )
        except Exception:
            for parameter, data in old.items():
                parameter.data = data
            head.weight = shared
            raise
    if tied:
        untie(model, [stream.head])
        model.config.tie_word_embeddings = False
    return model


@dataclass(frozen=True)
class _Stream:
    """Modules of a model at its residual stream of `size` features: all by name; `norms` with the linears they feed."""

    size: int
    embedding: str
    norms: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    head: str

    @staticmethod
    def of(model: nn.Module, inputs: Mapping[str, Any]) -> _Stream:
        """Find them in a run of `model`; ValueError for a model in which they cannot be found."""
        kind = type(model).__name__
        head = output_head(model)
        tokens = getattr(model, "get_input_embeddings", lambda: None)()
        embedding = next((name for name, module in model.named_modules() if module is tokens), None)
        if head is None or embedding is None or not is_embedding(tokens):
            raise ValueError(f"{kind}: expected a float decoder with an embedding and an output layer")
        modules = dict(model.named_modules())
        experts = [name for name, module in modules.items() if holds_experts(module)]
        if experts:
            raise ValueError(f"{experts[0]}: experts in 3-D parameters are not rotated; quantize the model as it is")
        linears = [name for name, module in modules.items() if is_linear(module)]
        size = tokens.weight.shape[1]
        norms = [name for name, module in modules.items() if is_norm(module) and len(module.weight) == size]
        groups = trace_groups(model, linears, norms, lambda: model(**inputs))
        missed = set(linears) - {name for group in groups for name in group.members}
        if missed:
            raise ValueError(f"{min(missed)}: the example does not reach it; give one that does")
        fed = {group.producer: group.members for group in groups if group.producer is not None}
        # The head reads a part of what the last norm gives, which is an output of the model too.
        rest = [name for name in norms if name not in fed]
        if len(rest) != 1 or any(head in members for members in fed.values()):
            raise ValueError(
                f"{kind}: {rest[0] if rest else 'no norm'} is not read by linears alone; it is not rotated"
            )
        fed[rest[0]] = (head,)
        readers = {name for members in fed.values() for name in members}
        writers = [name for name in linears if name not in readers and linear_shape(modules[name])[0] == size]
        return _Stream(size, embedding, fed, tuple(writers), head)

    def turn(self, model: nn.Module, rotation: torch.Tensor) -> None:
        """Rotate the stream by `rotation`, with the gains of norms in the linears that they feed."""
        for norm, members in self.norms.items():
            gain = _take_gain(model.get_submodule(norm), self.size)
            for name in members:
                linear = model.get_submodule(name)
                _set(linear, (oriented(linear, linear.weight).double() * gain) @ rotation)
        for name in self.writers:
            linear = model.get_submodule(name)
            _set(linear, rotation.t() @ oriented(linear, linear.weight).double())
            if linear.bias is not None:
                linear.bias.data = (linear.bias.double() @ rotation).to(linear.bias.dtype)
        table = model.get_submodule(self.embedding).weight
        table.data = (table.double() @ rotation).to(table.dtype)


def _set(linear: nn.Module, weight: torch.Tensor) -> None:
    linear.weight.data = oriented(linear, weight).to(linear.weight.dtype).contiguous()


def _take_gain(norm: nn.Module, size: int) -> torch.Tensor:
    """The gain of an RMSNorm, float64 ``[size]``, which becomes one."""
    if getattr(norm, "bias", None) is not None:
        raise ValueError(
            f"{type(norm).__name__}: expected an RMSNorm, got a norm with a bias; quantize the model as it is"
        )
    weight = norm.weight
    ones = torch.full((1, size), _LARGE, dtype=torch.float32)
    gain = norm(ones)[0].double()
    for value in (1.0, 0.0):  # Gemma's norms add one to their weight
        weight.data = torch.full_like(weight, value)
        if torch.allclose(norm(ones), torch.ones(1, size), rtol=1e-3):
            return gain
    raise ValueError(f"{type(norm).__name__}: expected an RMSNorm that multiplies by its weight, or by it plus one")
