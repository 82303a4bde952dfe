"""Folding a smoothing factor into the norm whose output it multiplies, so that it costs nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

_VECTORS = ("weight", "bias")


def is_norm(module: nn.Module) -> bool:
    """Whether `module` looks like a LayerNorm or RMSNorm over the last dimension: by its name and its vectors."""
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
def fold_into_norm(norm: nn.Module, factor: torch.Tensor) -> bool:
    """Scale the vectors of `norm` so that its output is multiplied by `factor`, float32 ``[K]``; False if it cannot.

    It cannot when the vectors are not float32, where folding would round the factor, when hooks see or change the
    output, and when the norm does more with its weight than multiply (Gemma's adds one), which trying it shows. The
    parameters are replaced, not written to.
    """
    vectors = {name: getattr(norm, name) for name in _VECTORS if getattr(norm, name, None) is not None}
    foldable = all(vector.dtype == torch.float32 and vector.shape == factor.shape for vector in vectors.values())
    if norm._forward_hooks or not foldable:
        return False
    folded = copy.copy(norm)
    scaled = {name: nn.Parameter(vector * factor, vector.requires_grad) for name, vector in vectors.items()}
    folded._parameters = {**norm._parameters, **scaled}
    width = len(factor)
    generator = torch.Generator().manual_seed(0)
    rows = 4 if width == 3 else 3  # so that channels are in the last dimension, and only there
    x = torch.randn(2, rows, width, dtype=torch.float32, generator=generator)
    try:
        same = torch.allclose(folded.forward(x), norm.forward(x) * factor, rtol=1e-4, atol=1e-6)
    except Exception:  # whatever a forward that is not ours needs, the factor can stay where it is
        return False
    if same:
        norm._parameters.update(scaled)
    return same
