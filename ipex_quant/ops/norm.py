"""Norms over the last dimension, alone or of a residual sum.

In all of them `x` is float32, bfloat16 or float16 ``[..., K]``, `weight` and `bias` are ``[K]`` in float32 or the dtype
of `x`, sums are made in float32, and results have the shape and dtype of `x`. None has a gradient. They raise
RuntimeError when shapes or dtypes do not fit.
"""

from __future__ import annotations

import torch

from .fakes import register_fake
from .library import native

_rms_norm = native.rms_norm.default
_layer_norm = native.layer_norm.default
_add_rms_norm = native.add_rms_norm.default
_add_layer_norm = native.add_layer_norm.default


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x * rsqrt(mean(x**2) + eps) * weight``.

    A `weight` in the dtype of `x` multiplies the normed values after they are rounded to it, as in Llama; one in
    float32 multiplies them before, as in Gemma (whose weight is ``1 + weight``).
    """
    return _rms_norm(x, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean(x)) * rsqrt(variance(x) + eps) * weight + bias``, rounded once; both vectors have one dtype."""
    return _layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of ``x + residual`` (of one shape and dtype, to which the sum is rounded first), and that sum."""
    return _add_rms_norm(x, residual, weight, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm` of ``x + residual`` (of one shape and dtype, to which the sum is rounded first), and that sum."""
    return _add_layer_norm(x, residual, weight, bias, eps)


def _like(x: torch.Tensor, residual: torch.Tensor | None = None, **vectors: torch.Tensor | None) -> torch.Tensor:
    torch._check(x.dim() > 0, lambda: "x: expected [..., K], got []")
    torch._check(residual is None or residual.shape == x.shape, lambda: f"residual: expected shape {list(x.shape)}")
    for name, vector in vectors.items():
        torch._check(
            vector is None or (vector.dim() == 1 and vector.shape[0] == x.shape[-1]),
            lambda name=name: f"{name}: expected [{x.shape[-1]}]",
        )
    return x.new_empty(x.shape)


@register_fake("rms_norm")
def _(x, weight, eps):
    return _like(x, weight=weight)


@register_fake("layer_norm")
def _(x, weight, bias, eps):
    return _like(x, weight=weight, bias=bias)


@register_fake("add_rms_norm")
def _(x, residual, weight, eps):
    return _like(x, residual, weight=weight), _like(x)


@register_fake("add_layer_norm")
def _(x, residual, weight, bias, eps):
    return _like(x, residual, weight=weight, bias=bias), _like(x)
