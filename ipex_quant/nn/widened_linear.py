"""A linear layer's product in float32 of tensors in a lower precision, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` in float32, whatever the dtypes of its arguments; gradients have theirs.

    For the gradient it keeps `x` and `weight` as they are, where casts before ``F.linear`` would keep float32 copies.
    """
    return _WidenedLinear.apply(x, weight, bias)


class _WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast("cpu", enabled=False):
            return (
                (rows @ weight.float()).to(x.dtype).view(x.shape) if for_x else None,
                (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if for_weight else None,
                rows.sum(dim=0).to(ctx.bias_dtype) if for_bias else None,
            )
