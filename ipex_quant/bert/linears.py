"""Linear layers in bfloat16 on CPUs on which torch has no fast matmul for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.fused_forward import FusedForward
from ..nn.prepacked import compute_dtype


def fuse_linears(model: nn.Module) -> None:
    """Let every ``nn.Linear`` of `model` multiply in the dtype that is fastest on this CPU."""
    for module in model.modules():
        plain = type(module) is nn.Linear and "forward" not in vars(module)
        if plain and compute_dtype(module.weight.dtype) != module.weight.dtype:
            module.forward = FastLinear(module)


class FastLinear(FusedForward):
    """Replaces the `forward` of an ``nn.Linear`` in bfloat16, and multiplies in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if x.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)  # which says what does not fit
        return _Float32Linear.apply(x, weight, bias)


class _Float32Linear(torch.autograd.Function):
    """``F.linear``, and its gradients, with products in float32 that are rounded to bfloat16."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            (rows @ weight.float()).to(x.dtype).view(x.shape) if for_x else None,
            (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(x.dtype) if for_weight else None,
            rows.sum(dim=0).to(x.dtype) if for_bias else None,
        )
