"""The quantization range with the least expected squared error on a histogram."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

COARSE = 0.75 ** torch.arange(16, dtype=torch.float32)
"""Shares of the full range that the first search round tries; heavy tails need shares near a hundredth."""

REFINEMENTS = (0.12, 0.04, 0.012)
"""Half widths of the later search rounds, relative to the best range so far."""

Affine = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Histogram:
    """A piecewise constant density of values, plus `low_count` values at `low` and `high_count` values at `high`.

    The density falls by `slopes`, float64 ``[E]``, at the ascending `edges`, float64 ``[E]``. A function's integral
    over the density is therefore the sum of its antiderivative at the edges, times `slopes`.
    """

    edges: torch.Tensor
    slopes: torch.Tensor
    low: float
    high: float
    low_count: int
    high_count: int

    @classmethod
    def of(cls, indices: torch.Tensor, counts: torch.Tensor, exponent: int, low: float, high: float) -> Histogram:
        """Make a histogram from the ascending bins `indices` and their `counts`; `low` and `high` are the exact bounds.

        The values of the first bin count as `low`, those of the last as `high`, and other bins spread theirs evenly.
        This is exact for a bound that is a frequent value (of a clamp, a ReLU or a constant); otherwise the outer bins
        hold few values.
        """
        counts_at = counts.tolist()
        inner = slice(1, -1)
        width = math.ldexp(1.0, exponent)
        left = (indices[inner] - (indices[inner] <= 0).long()).double() * width
        right = (indices[inner] + (indices[inner] >= 0).long()).double() * width
        density = counts[inner].double() / (right - left)
        edges, position = torch.cat([left, right]).unique(return_inverse=True)
        slopes = torch.zeros_like(edges).index_add_(0, position, torch.cat([-density, density]))
        return cls(edges, slopes, low, high, counts_at[0], counts_at[-1] if len(counts_at) > 1 else 0)

    def squared_error(self, scale: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        """Sum of squared errors, float64 ``[C]``, of rounding to ``scale * n`` with integers n in lowest..highest."""
        scale, lowest, highest = (value.double()[:, None] for value in (scale, lowest, highest))
        level, rest = _nearest(self.edges, scale, lowest, highest)
        # Antiderivative of the squared error, from 0: scale^3 / 12 for each whole step, rest^3 / 3 for the rest.
        spread = (level @ self.slopes) * (scale[:, 0] ** 3 / 12) + (rest * rest * rest) @ self.slopes / 3
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        counts = torch.tensor([self.low_count, self.high_count], dtype=torch.float64)
        return spread + _nearest(ends, scale, lowest, highest)[1].square() @ counts


def best_range(histogram: Histogram, affine: Affine, quant_range: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the low and high, float32 ``[1]``, of least squared error, within the histogram's range extended to 0.

    `affine` turns ranges into scales and zero points; `quant_range` is the smallest and the largest code. The search
    includes the whole range, so that its result is never worse.
    """
    low, high = (
        torch.tensor([end], dtype=torch.float32) for end in (min(histogram.low, 0.0), max(histogram.high, 0.0))
    )
    best_low, best_high = COARSE[:1], COARSE[:1]  # as shares of the whole range
    for shares in (COARSE, *(1 + width * torch.linspace(-1, 1, 9, dtype=torch.float32) for width in REFINEMENTS)):
        low_shares = (best_low * shares).clamp(max=1.0) if low < 0 else best_low
        high_shares = (best_high * shares).clamp(max=1.0) if high > 0 else best_high
        candidates = torch.cartesian_prod(low_shares, high_shares).reshape(-1, 2)
        scale, zero_point = affine(low * candidates[:, 0], high * candidates[:, 1])
        errors = histogram.squared_error(scale, quant_range[0] - zero_point, quant_range[1] - zero_point)
        best_low, best_high = candidates[errors.argmin()][:, None]
    return low * best_low, high * best_high


def _nearest(
    x: torch.Tensor, scale: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level that each value of `x` ``[E]`` rounds to, and the rounding error, both ``[C, E]``."""
    level = (x / scale).round_().clamp_(lowest, highest)
    return level, torch.addcmul(x, level, scale, value=-1.0)
