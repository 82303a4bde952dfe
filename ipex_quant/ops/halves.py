"""Float32 values joined from and split into halves of 16 bits, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .fakes import check_shape, register_fake
from .library import native

_join = native.join_halves.default
_split = native.split_halves.default


def join_halves(highs: Sequence[torch.Tensor], lows: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Write `ipex_quant.numerics.halves.join_float32` of each of `highs` and `lows` into `values`, one after the other.

    `highs` are bfloat16 and `lows` int16, of the same sizes, and `values` is float32 of the sum of these; all are flat,
    contiguous and do not overlap. Raises RuntimeError when an argument does not fit, with nothing written.
    """
    _join(highs, lows, values)


def split_halves(values: torch.Tensor, highs: Sequence[torch.Tensor], lows: Sequence[torch.Tensor]) -> None:
    """Undo `join_halves`: write `ipex_quant.numerics.halves.split_float32` of `values` into `highs` and `lows`."""
    _split(values, highs, lows)


@register_fake("join_halves")
def _(highs, lows, values):
    _check(values, highs, lows)


@register_fake("split_halves")
def _(values, highs, lows):
    _check(values, highs, lows)


def _check(values: torch.Tensor, highs: Sequence[torch.Tensor], lows: Sequence[torch.Tensor]) -> None:
    check_shape("values", values, "[n]")
    torch._check(len(highs) == len(lows), lambda: f"lows: expected {len(highs)} tensors, got {len(lows)}")
    for high, low in zip(highs, lows, strict=True):
        check_shape("highs", high, "[n]")
        check_shape("lows", low, "[n]")
