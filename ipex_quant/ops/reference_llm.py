"""Plain-torch definitions of the ops around the linears of a decoder layer: the oracle of the native ops' tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .post_op import PostOp, apply_post_op


def float_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    post_op: PostOp = PostOp.NONE,
    others: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """``x @ weight.T + bias`` summed in float32 and rounded to the dtype of `x`, then `post_op`."""
    bias = None if bias is None else bias.float()
    return apply_post_op(F.linear(x.float(), weight.float(), bias).to(x.dtype), post_op, others)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x * rsqrt(mean(x**2) + eps) * weight``; a weight in the dtype of `x` multiplies values rounded to it."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if weight.dtype == x.dtype:
        return normed.to(x.dtype) * weight
    return (normed * weight).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean(x)) * rsqrt(variance(x) + eps) * weight + bias``, rounded once."""
    centered = x.float() - x.float().mean(-1, keepdim=True)
    normed = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    return normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of the sum of `x` and `residual` in their dtype, and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm` of the sum of `x` and `residual` in their dtype, and the sum."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int | None = None, interleaved: bool = False
) -> torch.Tensor:
    """Rotate pairs of features, which are neighbours or half of `rotary_dim` apart: ``x * cos + partner * sin``."""
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    if interleaved:
        partner = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    cos, sin = (_per_feature(table.float(), rotary_dim, interleaved)[:, :, None] for table in (cos, sin))
    return torch.cat(((rotated * cos + partner * sin).to(x.dtype), rest), -1)


def _per_feature(table: torch.Tensor, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    if table.shape[-1] == rotary_dim:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def silu_mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``silu(x) * y``."""
    return F.silu(x) * y


def gelu_mul(x: torch.Tensor, y: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    """``gelu(x) * y``."""
    return F.gelu(x, approximate="tanh" if tanh else "none") * y


def silu_mul_halves(xy: torch.Tensor) -> torch.Tensor:
    """`silu_mul` of the first and the second half of every row."""
    return silu_mul(*xy.chunk(2, -1))


def gelu_mul_halves(xy: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    """`gelu_mul` of the first and the second half of every row."""
    x, y = xy.chunk(2, -1)
    return gelu_mul(x, y, tanh)
