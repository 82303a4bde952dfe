"""Tensors as one dimension, in the order in which a parameter lies in memory."""

from __future__ import annotations

import torch


class Layout:
    """The order of the elements of `x` in memory; `dense` if nothing lies between them."""

    def __init__(self, x: torch.Tensor) -> None:
        self._order = None if x.is_contiguous() else sorted(range(x.dim()), key=lambda i: x.stride(i), reverse=True)
        self.dense = self.holds(x)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `x`, of the same shape, lies in this order, without gaps."""
        return self._ordered(x).is_contiguous()

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """The elements of `x` in this order: the memory of `x`, if it `holds` that, else a copy."""
        return self._ordered(x).reshape(-1)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._order is None else x.permute(self._order)  # a call less for most parameters


def aligned(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` in the memory order of `like`: itself, or a copy."""
    return x if Layout(like).holds(x) else torch.empty_like(like, dtype=x.dtype).copy_(x)
