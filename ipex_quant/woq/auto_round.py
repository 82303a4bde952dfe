"""AutoRound: tune the rounding and the clipping of weights by the signs of gradients.

Source: Cheng, Zhang, Shen, Cai, He, Lv, Liu, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization
of LLMs", arXiv 2309.05516. A quantized weight is ``s * (clamp(round(w / s + v) + zp) - zp)``, with an offset v in
-0.5..0.5 of each weight, and scale and zero point of the range of its group, whose upper and lower end are multiplied
by the factors alpha and beta in 0..1. Gradients pass through rounding unchanged. Of a table, whose levels are not
evenly spaced, an offset counts in distances of the two levels that ``w / s`` lies between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..numerics.affine import code_offset, code_range, find_scales, in_groups, plain_codes
from ..numerics.codebooks import CODEBOOKS, code_levels, nearest_codes
from ..numerics.intervals import Intervals
from ..numerics.quantized_weight import QuantizedWeight, code_dtype
from ..numerics.scheme import WeightScheme
from .clip_search import check_grid
from .rtn import rtn

_LEAST_CLIP, _MOST_CLIP = 0.1, 1.0
"""Bounds of the factors; the lower one keeps scales away from 0."""


@dataclass(frozen=True)
class AutoRoundOptions:
    """Options of AutoRound.

    - `steps`: steps of every block.
    - `batch_size`: samples in each step.
    - `rate`: how much a step changes offsets at first; it falls to 0 linearly. Without it, ``0.5 / steps``, with which
      an offset can move by a quarter of a quantization step in all.
    - `clip_rate`: the same for clip factors, relative to `rate`: 1 in the paper. The default 0 keeps the ranges, which
      GPTQ has searched for; tuning them too made models worse.
    - `seed`: of the order of the samples; with the same seed and number of threads the result has the same bits.
    - `scale_dtype`: dtype that scales are rounded to before they quantize the weight.

    Raises ValueError for `steps` or a `batch_size` below 1, a `rate` that is not above 0, and a negative
    `clip_rate`.
    """

    steps: int = 100
    batch_size: int = 4
    rate: float | None = None
    clip_rate: float = 0.0
    seed: int = 0
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"rate: expected a number above 0, usually 0.5 / steps, got {self.rate}")
        if not 0 <= self.clip_rate < float("inf"):
            raise ValueError(f"clip_rate: expected a number from 0, got {self.clip_rate}")

    def rate_at(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        return (self.rate or 0.5 / self.steps) * (1 - step / self.steps)


class _Rounded(NamedTuple):
    """A weight rounded by the current parameters; the first two are per group, the others ``[N, groups, size]``.

    `levels` are what the weights become before they are multiplied by the scales.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor
    scaled: torch.Tensor
    inside: torch.Tensor
    codes: torch.Tensor
    levels: torch.Tensor


class TunedWeight:
    """A weight ``[N, K]`` that is quantized by parameters which gradients change.

    `offsets` ``[N, groups, size]`` are added before rounding; `high_clip` and `low_clip` ``[N, groups]`` multiply the
    ends of the ranges. A symmetric scheme has `high_clip` alone, which multiplies both. All are float32. At first
    `weight` is rounded to nearest on the grid of `start`, whose `g_idx` must be None, or without it on that of its own
    ranges. Raises TypeError and ValueError as `rtn` and `check_grid` do.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scheme: WeightScheme,
        scale_dtype: torch.dtype = torch.float32,
        start: QuantizedWeight | None = None,
    ) -> None:
        check_grid(scheme.dtype)
        nearest = rtn(weight, scheme, scale_dtype)  # also checks the weight
        scales, zero_points = (
            (nearest.scales, nearest.zero_points) if start is None else (start.scales, start.zero_points)
        )
        self.scheme, self.scale_dtype, self.shape = scheme, scale_dtype, (weight.shape[0], weight.shape[1])
        self._weight = in_groups(weight.detach().float(), scheme)
        self._table = CODEBOOKS[scheme.dtype].unique() if scheme.dtype in CODEBOOKS else None
        if self._table is not None:
            self._between = Intervals(self._table[1:-1])
        self._lowest, self._highest = code_range(scheme.dtype) if self._table is None else (0, len(self._table) - 1)
        self._steps = float(self._highest - self._lowest)
        self._signs = scales.sign()
        self.offsets = torch.zeros_like(self._weight)
        self.high_clip = torch.ones_like(scales)
        if zero_points is None:
            self._steps = float((1 << (scheme.dtype.bits - 1)) - 1)
            self._low, self._high, self.low_clip = scales, scales.abs() * self._steps, None
        else:
            self._low, self._high = (scales * (end - zero_points) for end in (self._lowest, self._highest))
            self.low_clip = torch.ones_like(scales)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What `step` changes."""
        return [self.offsets, self.high_clip, *([] if self.low_clip is None else [self.low_clip])]

    def values(self) -> torch.Tensor:
        """The dequantized weight, float32 ``[N, K]``."""
        rounded = self._rounded()
        return self._flat(rounded.levels.mul_(rounded.scales.unsqueeze(-1)))

    def quantized_weight(self) -> QuantizedWeight:
        """The quantized weight."""
        rounded, dtype = self._rounded(), self.scheme.dtype
        codes = rounded.codes if self._table is None else nearest_codes(rounded.levels, dtype)
        codes = plain_codes(self._flat(codes).to(code_dtype(dtype)), dtype)
        zero_points = None if self.scheme.symmetric else rounded.zero_points.to(torch.int16)
        return QuantizedWeight(codes, rounded.scales, zero_points, None, self.scheme, self.shape)

    def step(self, gradient: torch.Tensor, rate: float, clip_rate: float) -> None:
        """Move offsets by `rate` and factors by `clip_rate` against the signs of their gradients.

        `gradient`, float ``[N, K]``, is that of `values`.
        """
        gradients = in_groups(gradient.float(), self.scheme)
        rounded = self._rounded()
        scales, inside = rounded.scales, rounded.inside
        # d value / d scale: level - scaled where nothing is clipped, level where it is
        by_scale = rounded.levels.sub_(rounded.scaled.mul_(inside)).mul_(gradients).sum(-1)
        passed = gradients * inside
        if self.low_clip is None:
            _move(self.high_clip, by_scale * self._signs, clip_rate)
            passed *= self._signs.unsqueeze(-1)
        else:
            # scale = (high - low) / steps; zero = -low / scale, on which only clipped values depend, by -scale
            by_zero = (passed.sum(-1) - gradients.sum(-1)).mul_(scales)
            low = self._low * self.low_clip
            by_scale += by_zero * low / scales.square()
            _move(self.high_clip, by_scale * self._high, clip_rate)
            _move(self.low_clip, (by_scale / -self._steps - by_zero / scales) * self._low, clip_rate)
        self.offsets.sub_(passed.sign_(), alpha=rate).clamp_(-0.5, 0.5)

    def _rounded(self) -> _Rounded:
        high = self._high * self.high_clip
        if self.low_clip is None:
            scales = self._stored(find_scales(high, self._steps)) * self._signs
            zeros = torch.full_like(scales, code_offset(self.scheme.dtype) if self._table is None else 0)
        else:
            low = self._low * self.low_clip
            scales = self._stored(find_scales(high - low, self._steps))
            zeros = torch.round(low / scales).neg_().add_(self._lowest).clamp_(self._lowest, self._highest)
        scaled = self._weight * (1.0 / scales).unsqueeze(-1)
        places = scaled if self._table is None else self._places(scaled)
        unclamped = (places + self.offsets).round_().add_(zeros.unsqueeze(-1))
        codes = unclamped.clamp(self._lowest, self._highest)
        levels = codes - zeros.unsqueeze(-1) if self._table is None else code_levels(codes, self._table)
        return _Rounded(scales, zeros, scaled, unclamped == codes, codes, levels)

    def _places(self, values: torch.Tensor) -> torch.Tensor:
        """Where `values` lie among the levels of the table: at i on level i, and linearly between and beyond them."""
        below = self._between.index(values)
        gaps = code_levels(below, self._table.diff())
        return (values - code_levels(below, self._table)).div_(gaps).add_(below)

    def _stored(self, scales: torch.Tensor) -> torch.Tensor:
        """`scales` as `scale_dtype` holds them; its smallest number in place of 0."""
        info = torch.finfo(self.scale_dtype)
        return scales.to(self.scale_dtype).float().clamp_(min=info.tiny * info.eps)

    def _flat(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.flatten(1)[:, : self.shape[1]]


def _move(clip: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
    clip.sub_(gradient.sign(), alpha=rate).clamp_(_LEAST_CLIP, _MOST_CLIP)
