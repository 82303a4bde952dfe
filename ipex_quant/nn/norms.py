"""Tells which modules are norms, and how to multiply a norm's output by a factor."""

from __future__ import annotations

import copy

import torch
from torch import nn

_VECTORS = ("weight", "bias")


def is_norm(module: nn.Module) -> bool:
    """Whether `module` looks like a LayerNorm or RMSNorm over the last dimension, by its class name and parameters."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if p is not None}
    weight = own.get("weight")
    return (
        "norm" in type(module).__name__.lower()
        and weight is not None
        and weight.dim() == 1
        and own.keys() <= set(_VECTORS)
        and next(module.children(), None) is None
    )


@torch.no_grad()
def scaled_vectors(norm: nn.Module, factor: torch.Tensor, offset: float = 0.0) -> dict[str, torch.Tensor] | None:
    """Weight and bias with which the output of `norm` is multiplied by `factor`, float32 ``[K]``; None if impossible.

    They have the dtype of the old ones. The norm is taken to multiply by its weight plus `offset`; a run checks this.
    """
    vectors = {name: getattr(norm, name) for name in _VECTORS if getattr(norm, name, None) is not None}
    if any(vector.shape != factor.shape for vector in vectors.values()):
        return None
    old = {name: vector.detach().float() for name, vector in vectors.items()}
    new = {name: vector * factor for name, vector in old.items()}
    new["weight"] = (old["weight"] + offset) * factor - offset
    before, after = copy.copy(norm), copy.copy(norm)
    before._parameters = {**norm._parameters, **_parameters(old)}
    after._parameters = {**norm._parameters, **_parameters(new)}
    width = len(factor)
    generator = torch.Generator().manual_seed(0)
    rows = 4 if width == 3 else 3  # not `width`, so that a norm over another dimension fails
    x = torch.randn(2, rows, width, generator=generator, dtype=torch.float32)
    try:
        same = torch.allclose(after.forward(x), before.forward(x) * factor, rtol=1e-4, atol=1e-6)
    except Exception:  # on any failure of foreign code, the norm stays unchanged
        return None
    return {name: vector.to(vectors[name].dtype) for name, vector in new.items()} if same else None


def _parameters(vectors: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(vector, False) for name, vector in vectors.items()}
