"""Folding a smoothing factor into the norm whose output it multiplies, so that it costs nothing."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.norms import scaled_vectors


def fold_into_norm(norm: nn.Module, factor: torch.Tensor) -> bool:
    """Scale the vectors of `norm` so that its output is multiplied by `factor`, float32 ``[K]``; False if it cannot.

    It cannot when the vectors are not float32, where folding would round the factor, when hooks see or change the
    output, and when the norm does more with its weight than multiply (Gemma's adds one), which trying it shows. The
    parameters are replaced, not written to.
    """
    if norm._forward_hooks or any(vector.dtype != torch.float32 for vector in norm.parameters(recurse=False)):
        return False
    scaled = scaled_vectors(norm, factor)
    for name, vector in (scaled or {}).items():
        norm._parameters[name] = nn.Parameter(vector, norm.get_parameter(name).requires_grad)
    return scaled is not None
