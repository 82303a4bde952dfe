"""`search_scales`: shrink the range of every group to where rounding changes its weights least."""

from __future__ import annotations

import torch

from ..numerics.affine import code_offset, code_range, in_groups, quantize
from ..numerics.codebooks import CODEBOOKS, code_levels, nearest_codes
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqWeightDtype
from .rtn import round_scales

_NORM = 3
"""Exponent of errors. More than 2, since large errors of few weights are harder to compensate for."""

_ROWS = 64
"""Rows at a time, whose temporaries fit a core's cache."""


def clip_fractions(clip_steps: int, lowest_clip: float) -> torch.Tensor:
    """1 and `clip_steps` evenly spaced fractions down to `lowest_clip`, float32; ValueError if one is out of range."""
    if clip_steps < 0:
        raise ValueError(f"clip_steps: expected at least 0, got {clip_steps}")
    if not 0 < lowest_clip <= 1:
        raise ValueError(f"lowest_clip: expected a fraction of the range, above 0 and at most 1, got {lowest_clip}")
    return torch.linspace(1, lowest_clip, clip_steps + 1, dtype=torch.float32)


def search_scales(
    weight: torch.Tensor,
    scheme: WeightScheme,
    importance: torch.Tensor,
    fractions: torch.Tensor,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points, ``[N, groups]``, with which rounding changes `weight`, float ``[N, K]``, least.

    Tries `fractions` of every group's range, 1 first, whose ends shrink alike, so that zero points are those of the
    range; values outside are clipped. Where there is more than one, a table that is not symmetric is tried upside down
    too, with negative scales. The error of an input feature counts by its `importance` ``[K]``, not negative. Raises as
    `numerics.affine.quantize`, `round_scales` and `check_grid` do.

    Source: the search of neural-compressor's and AutoGPTQ's ``mse`` option, without its grid over zero points.
    """
    check_grid(scheme.dtype)
    nearest = quantize(weight, scheme)
    candidates = _candidates(nearest.scales, fractions, scale_dtype)
    if len(fractions) > 1 and _has_two_sides(scheme.dtype):
        upside_down = quantize(-weight, scheme).scales
        candidates += [-each for each in _candidates(upside_down, fractions, scale_dtype)]
    importances = in_groups(importance.float().unsqueeze(0), scheme)
    scales = candidates[0].clone()
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        groups = in_groups(weight[rows].detach().float(), scheme)
        zero = code_offset(scheme.dtype) if nearest.zero_points is None else nearest.zero_points[rows].unsqueeze(-1)
        least = torch.full(groups.shape[:2], torch.inf, dtype=torch.float32)
        for candidate in candidates:
            own = candidate[rows].unsqueeze(-1)
            errors = _rounded(groups / own, scheme.dtype, zero).mul_(own).sub_(groups)
            total = (errors.square() * errors.abs_()).mul_(importances).sum(-1)
            better = total < least
            least = torch.where(better, total, least)
            scales[rows] = torch.where(better, candidate[rows], scales[rows])
    return scales, nearest.zero_points


def check_grid(dtype: WoqWeightDtype) -> None:
    """Raise ValueError for a dtype whose codes are floats, which have no steps to move between."""
    if dtype.is_float:
        raise ValueError(f"dtype: expected integers or a table of values, got {dtype.name}; round to nearest")


def _has_two_sides(dtype: WoqWeightDtype) -> bool:
    """Whether `dtype` has a table with other magnitudes below zero than above it."""
    return dtype in CODEBOOKS and not torch.equal(CODEBOOKS[dtype].sort().values, CODEBOOKS[dtype].neg().sort().values)


def _candidates(scales: torch.Tensor, fractions: torch.Tensor, scale_dtype: torch.dtype) -> list[torch.Tensor]:
    """`fractions` of `scales`, 1 first, as `scale_dtype` holds them; the whole where it holds none."""
    whole = round_scales(scales, scale_dtype)
    smaller = [(scales * fraction).to(scale_dtype).float() for fraction in fractions[1:].tolist()]
    return [whole, *(torch.where(each > 0, each, whole) for each in smaller)]


def _rounded(scaled: torch.Tensor, dtype: WoqWeightDtype, zero: torch.Tensor | int) -> torch.Tensor:
    """What `scaled` weights, a new tensor, become on the grid of `dtype`, before they are multiplied by the scale."""
    if dtype in CODEBOOKS:
        return code_levels(nearest_codes(scaled, dtype), CODEBOOKS[dtype])
    lowest, highest = (bound - zero for bound in code_range(dtype))
    return torch.clamp(scaled.round_(), lowest, highest)


def rtn_searched(
    weight: torch.Tensor,
    scheme: WeightScheme,
    importance: torch.Tensor,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """`rtn.rtn` with the scales that `search_scales` finds for the `importance` ``[K]`` of features; raises as they do.

    Features without importance count a little, so that groups of them keep their range.
    """
    importance = importance.float()
    floor = 1e-3 * importance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    fractions = clip_fractions(clip_steps=20, lowest_clip=0.6)
    scales, zero_points = search_scales(weight, scheme, importance.clamp(min=floor), fractions, scale_dtype)
    return quantize(weight, scheme, scales, zero_points)
