"""Whether autograd has to see a computation: the native ops have no gradient, plain torch takes their place there."""

from __future__ import annotations

import torch


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a result of `tensors` would be part of an autograd graph."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
