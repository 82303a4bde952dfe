"""Float32 values joined from and split into halves of 16 bits, and SGD on these, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .fakes import check_shape, register_fake
from .library import native

_join = native.join_halves.default
_split = native.split_halves.default
_sgd = native.sgd_halves.default


def join_halves(highs: Sequence[torch.Tensor], lows: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Write `ipex_quant.numerics.halves.join_float32` of each of `highs` and `lows` into `values`, one after the other.

    `highs` are bfloat16 and `lows` int16, of the same sizes, and `values` is float32 of the sum of these; all are flat,
    contiguous and do not overlap. Raises RuntimeError when an argument does not fit, with nothing written.
    """
    _join(highs, lows, values)


def split_halves(values: torch.Tensor, highs: Sequence[torch.Tensor], lows: Sequence[torch.Tensor]) -> None:
    """Undo `join_halves`: write `ipex_quant.numerics.halves.split_float32` of `values` into `highs` and `lows`."""
    _split(values, highs, lows)


def sgd_halves(
    highs: Sequence[torch.Tensor],
    lows: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    factor: float = 1.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """Do what ``torch._fused_sgd_`` does, in place, to the values of the halves `highs` and `lows`.

    The tensors are as for `join_halves`. `grads` are bfloat16, and multiplied by `factor`; `momenta`, float32, are
    written, the `first` time without being read, and are none where `momentum` is 0. Raises RuntimeError when an
    argument does not fit, with nothing written.
    """
    floats = lr, momentum, dampening, weight_decay, factor
    _sgd(highs, lows, grads, momenta, *floats, nesterov, maximize, first)


@register_fake("join_halves")
def _(highs, lows, values):
    _check(highs, lows)
    check_shape("values", values, "[n]")


@register_fake("split_halves")
def _(values, highs, lows):
    _check(highs, lows)
    check_shape("values", values, "[n]")


@register_fake("sgd_halves")
def _(highs, lows, grads, momenta, *settings):
    _check(highs, lows)
    _check(highs, grads)
    if momenta:
        _check(highs, momenta)


def _check(highs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    torch._check(len(highs) == len(others), lambda: f"expected {len(highs)} tensors as in highs, got {len(others)}")
    for tensor in (*highs, *others):
        check_shape("highs and what goes with them", tensor, "[n]")
