"""Rotary position embedding."""

from __future__ import annotations

import torch

from .fakes import check_shape, register_fake
from .library import native

_rotary = native.rotary.default


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int | None = None, interleaved: bool = False
) -> torch.Tensor:
    """Rotate pairs of features by the angle of their position: ``(a * cos - b * sin, b * cos + a * sin)``.

    `x` is float32, bfloat16 or float16 ``[B, L, H, D]`` with any strides; its first `rotary_dim` features rotate, by
    default all. Pairs are neighbours if `interleaved`, else half of `rotary_dim` apart. `cos` and `sin` are
    ``[B or 1, L, rotary_dim or half of it]``, a value for every feature or for every pair, in float32 or the dtype of
    `x`. Computes in float32 and rounds once. Returns a contiguous tensor like `x`, without a gradient. Raises
    RuntimeError when an argument does not fit.
    """
    return _rotary(x, cos, sin, x.shape[-1] if rotary_dim is None else rotary_dim, interleaved)


@register_fake("rotary")
def _(x, cos, sin, rotary_dim, interleaved):
    check_shape("x", x, "[B, L, H, D]")
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, "[B or 1, L, columns]")
    return x.new_empty(x.shape)
