"""Dropout with few random numbers: 16 bits decide about an element, where torch draws a number for each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.fused_forward import FusedForward

_STEPS = 1 << 16


class FastDropout(FusedForward):
    """Replaces the `forward` of an ``nn.Dropout`` by `drop`."""

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return drop(input, self.module.p) if self.module.training else input


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """`x` with each element 0 with probability `p`, to a multiple of 2**-16, and the others divided by ``1 - p``.

    It draws from torch's default generator, other numbers than torch's own dropout.
    """
    dropped = round(p * _STEPS)
    if dropped == 0:
        return x
    if dropped == _STEPS or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
        return F.dropout(x, p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _STEPS // 2
    return _Product.apply(x, kept, _STEPS / (_STEPS - dropped))


class _Product(torch.autograd.Function):
    """``x * kept * factor``; only `x` has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.factor = factor
        return (x * kept).mul_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.factor), None, None
