"""Folds a smoothing factor into the norm whose output it multiplies, which makes the factor free at run time."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.norms import scaled_vectors


def fold_into_norm(norm: nn.Module, factor: torch.Tensor) -> bool:
    """Multiply the output of `norm` by `factor`, float32 ``[K]``, through its weight and bias; False if impossible.

    It is impossible for vectors that are not float32 (folding would round the factor), for a norm with forward hooks
    (they see the output), and for a norm that does more than multiply by its weight (Gemma's adds one), as a trial run
    shows. New parameters replace the old ones, which keep their values.
    """
    if norm._forward_hooks or any(vector.dtype != torch.float32 for vector in norm.parameters(recurse=False)):
        return False
    scaled = scaled_vectors(norm, factor)
    for name, vector in (scaled or {}).items():
        norm._parameters[name] = nn.Parameter(vector, norm.get_parameter(name).requires_grad)
    return scaled is not None
