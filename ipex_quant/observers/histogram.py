"""`HistogramObserver`: an exactly mergeable histogram, and the range that minimises the quantization error."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from .observer import Observer, float_values
from .range_search import Histogram, best_range

MAX_BINS = 1 << 14
"""Most bins: their indices, negative and positive ones, are counted as int16."""

MIN_EXPONENT = -120
"""Bins are at least 2**MIN_EXPONENT wide, so that a float32 can be divided by their width."""


class HistogramObserver(Observer):
    """Counts values in at most `bins` bins and answers the range with the least expected squared quantization error.

    A value lies in the bin ``trunc(x / 2**exponent)``; bin 0 covers both sides of zero. The exponent is the smallest
    with which the range seen, zero included, takes at most `bins` bins. Hence the statistics depend only on the values
    seen, not on their order or their split over batches and ranks: widening the range merges bins in pairs, exactly.
    Buffers: `histogram` int64 ``[2 * bins - 1]``, where bin i is at ``i + bins - 1``; `min_val` and `max_val`, exact.
    """

    histogram: torch.Tensor

    def __init__(self, bins: int = 2048, *args: Any, **kwargs: Any) -> None:
        if not isinstance(bins, int) or not 2 <= bins <= MAX_BINS:
            raise ValueError(f"HistogramObserver: bins: expected an integer in 2..{MAX_BINS}, got {bins}")
        self.bins = bins
        super().__init__(*args, **kwargs)

    @property
    def exponent(self) -> int:
        """Binary logarithm of the width of a bin."""
        return smallest_exponent(float(self.min_val), float(self.max_val), self.bins)

    def reset(self) -> None:
        """Forget what was seen."""
        super().reset()
        self.register_buffer("histogram", torch.zeros(2 * self.bins - 1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        values = float_values(x)
        self._widen_bins(*torch.aminmax(values))
        # A product with a power of two is exact, and the conversion to an integer truncates.
        indices = (values * math.ldexp(1.0, -self.exponent)).to(torch.int16).add_(self.bins - 1)
        self.histogram = self.histogram + torch.bincount(indices.reshape(-1), minlength=len(self.histogram))
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._require_data()
        return self._affine(*self.best_range())

    def best_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high end, float32 ``[1]``, of the range whose quantization parameters err least on the histogram."""
        low, high = float(self.min_val), float(self.max_val)
        used = self.histogram.nonzero().reshape(-1)
        histogram = Histogram.of(used - (self.bins - 1), self.histogram[used], self.exponent, low, high)
        return best_range(histogram, self._affine, (self.quant_min, self.quant_max))

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Combine the statistics of all ranks of `group`, exactly."""
        before = self.exponent if self.has_data else None
        super().reduce(group)
        self._merge_bins(before)
        self.histogram = self.histogram.clone()
        dist.all_reduce(self.histogram, group=group)

    def _widen_bins(self, low: torch.Tensor, high: torch.Tensor) -> None:
        before = self.exponent if self.has_data else None
        self._widen(low, high)
        self._merge_bins(before)

    def _merge_bins(self, before: int | None) -> None:
        """Bring the counts from bins of exponent `before`, None when there are none, to those of `exponent`."""
        if before is None or before == self.exponent:
            return
        indices = torch.arange(1 - self.bins, self.bins, device=self.histogram.device)
        merged = indices.sign() * (indices.abs() >> (self.exponent - before)) + self.bins - 1
        self.histogram = torch.zeros_like(self.histogram).index_add_(0, merged, self.histogram)

    def _own_arguments(self) -> dict[str, Any]:
        return {"bins": self.bins}


def smallest_exponent(low: float, high: float, bins: int) -> int:
    """The smallest e with which bins ``trunc(x / 2**e)`` of ``[min(low, 0), max(high, 0)]`` are at most `bins`."""
    low, high = min(low, 0.0), max(high, 0.0)

    def fits(exponent: int) -> bool:
        return int(math.ldexp(high, -exponent)) - int(math.ldexp(low, -exponent)) < bins

    if high == low:
        return MIN_EXPONENT
    exponent = max(math.frexp((high - low) / bins)[1] - 2, MIN_EXPONENT)
    while not fits(exponent):
        exponent += 1
    return exponent
