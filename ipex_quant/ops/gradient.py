"""Tells whether a computation needs a gradient, which native ops do not have."""

from __future__ import annotations

import torch


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a result computed from `tensors` would be part of an autograd graph."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def needs_function(*tensors: torch.Tensor | None) -> bool:
    """`needs_gradient`, but not in a graph of `torch.jit.trace`.

    With an autograd function, which is Python, the graph could not be saved; without, it has no gradient there.
    """
    return needs_gradient(*tensors) and not torch.jit.is_tracing()
