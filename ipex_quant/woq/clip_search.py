"""`search_scales`: shrink the range of every group to where rounding changes its weights least."""

from __future__ import annotations

import torch

from ..numerics.affine import code_offset, code_range, in_groups, quantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
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
    range; values outside are clipped. The error of an input feature counts by its `importance` ``[K]``, not negative.
    Raises as `numerics.affine.quantize` and `round_scales` do, ValueError for a `scheme` without integers too.

    Source: the search of neural-compressor's and AutoGPTQ's ``mse`` option, without its grid over zero points.
    """
    if not scheme.dtype.has_integers:
        raise ValueError(f"dtype: only integers have a range to clip, got {scheme.dtype.name}")
    nearest = quantize(weight, scheme)
    whole = round_scales(nearest.scales, scale_dtype)
    candidates = [whole]
    for fraction in fractions[1:].tolist():
        scales = (nearest.scales * fraction).to(scale_dtype).float()
        candidates.append(torch.where(scales > 0, scales, whole))
    importances = in_groups(importance.float().unsqueeze(0), scheme)
    scales = whole.clone()
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        groups = in_groups(weight[rows].detach().float(), scheme)
        zero = code_offset(scheme.dtype) if nearest.zero_points is None else nearest.zero_points[rows].unsqueeze(-1)
        lowest, highest = (bound - zero for bound in code_range(scheme.dtype))
        least = torch.full(groups.shape[:2], torch.inf, dtype=torch.float32)
        for candidate in candidates:
            own = candidate[rows].unsqueeze(-1)
            errors = torch.clamp((groups / own).round_(), lowest, highest).mul_(own).sub_(groups)
            total = (errors.square() * errors.abs_()).mul_(importances).sum(-1)
            better = total < least
            least = torch.where(better, total, least)
            scales[rows] = torch.where(better, candidate[rows], scales[rows])
    return scales, nearest.zero_points


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
