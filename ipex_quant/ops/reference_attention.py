"""Plain-torch definition of attention and its caches: what the ops are tested against, written to be read."""

from __future__ import annotations

import math

import torch

from .reference import MIN_RANGE


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ipex_quant.ops.attention`, in float64 up to the last rounding."""
    key, value = _gathered(key, key_scales, rows), _gathered(value, value_scales, rows)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query.double() @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, tokens = scores.shape[-2:]
    distance = torch.arange(tokens) - torch.arange(tokens - queries, tokens)[:, None]  # of a token from its query
    if alibi is not None:
        scores = scores + alibi.double()[:, None, None] * distance
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal or window:
        scores = scores.masked_fill(distance > 0, -math.inf)
    if window:
        scores = scores.masked_fill(distance <= -window, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = scores.softmax(-1).masked_fill(nothing, 0.0)
    return (probabilities @ value).transpose(1, 2).to(query.dtype)


def _gathered(cache: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    """The tokens that each sequence sees, in float64."""
    floats = cache.double() if scales is None else cache.double() * scales[..., None].double()
    if rows is None:
        return floats
    return floats.transpose(1, 2)[rows, torch.arange(cache.shape[2])].transpose(1, 2)


def quantize_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of `x` and float32 scales, one for each run along the last dimension."""
    floats = x.float()
    largest = floats.abs().amax(-1)
    inverse = torch.where(largest >= MIN_RANGE, torch.full_like(largest, 127) / largest, 0.0)
    return (floats * inverse[..., None]).round().clamp(-127, 127).to(torch.int8), largest / 127


def write_cache(key: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None, start: int) -> None:
    """As `ipex_quant.ops.write_cache`."""
    place = slice(start, start + key.shape[2])
    if scales is None:
        cache[:, :, place] = key
    else:
        cache[:, :, place], scales[:, :, place] = quantize_token(key)
