"""Activated gate times up, as gated MLPs compute it between their linears.

All take float32, bfloat16 or float16 of any shape and return that dtype; the activated gate is rounded to it before the
multiplication, as in eager code. None has a gradient. They raise RuntimeError when shapes or dtypes do not fit.
"""

from __future__ import annotations

import torch

from .fakes import register_fake
from .library import native
from .post_op import PostOp

_product = native.gated_product.default
_product_halves = native.gated_product_halves.default
_GELU, _GELU_TANH, _SILU = int(PostOp.GELU), int(PostOp.NEW_GELU), int(PostOp.SILU)


def silu_mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``silu(x) * y`` of two tensors of one shape and dtype."""
    return _product(x, y, _SILU)


def gelu_mul(x: torch.Tensor, y: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    """``gelu(x) * y`` of two tensors of one shape and dtype; `tanh` chooses the approximation by tanh."""
    return _product(x, y, _GELU_TANH if tanh else _GELU)


def silu_mul_halves(xy: torch.Tensor) -> torch.Tensor:
    """``silu(x) * y`` where rows of `xy` ``[..., 2 * N]`` hold x, then y; returns ``[..., N]``."""
    return _product_halves(xy, _SILU)


def gelu_mul_halves(xy: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    """``gelu(x) * y`` where rows of `xy` ``[..., 2 * N]`` hold x, then y; returns ``[..., N]``."""
    return _product_halves(xy, _GELU_TANH if tanh else _GELU)


@register_fake("gated_product")
def _(x, y, activation):
    torch._check(y.shape == x.shape, lambda: f"y: expected the shape of x, {list(x.shape)}, got {list(y.shape)}")
    return x.new_empty(x.shape)


@register_fake("gated_product_halves")
def _(xy, activation):
    torch._check(xy.dim() > 0 and xy.shape[-1] % 2 == 0, lambda: f"x: expected [..., 2 * N], got {list(xy.shape)}")
    return xy.new_empty(*xy.shape[:-1], xy.shape[-1] // 2)
