"""Plain torch in the place of the native attention ops, until they are built."""

from __future__ import annotations

import torch


def _gather(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    if rows is None:
        return x
    return x[rows.long(), :, torch.arange(x.shape[2])].transpose(1, 2)


def attention(query, key, value, *, scale, causal=False, mask=None, window=0, softcap=0.0, alibi=None,
              key_scales=None, value_scales=None, rows=None):  # fmt: skip
    key, value = _gather(key, rows).float(), _gather(value, rows).float()
    if key_scales is not None:
        key = key * _gather(key_scales, rows)[..., None]
        value = value * _gather(value_scales, rows)[..., None]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query.float() @ key.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    t = torch.arange(key.shape[2])
    if alibi is not None:
        scores = scores + alibi[:, None, None] * (t - at)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(t > at, -torch.inf)
    if window:
        scores = scores.masked_fill(t <= at - window, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0)
    return (weights @ value).transpose(1, 2).to(query.dtype).contiguous()


def write_cache(key, cache, scales, start):
    length = key.shape[2]
    assert start + length <= cache.shape[2]
    if scales is None:
        cache[:, :, start : start + length] = key
        return
    scale = key.float().abs().amax(-1) / 127
    scales[:, :, start : start + length] = scale
    cache[:, :, start : start + length] = (key.float() / scale.clamp_min(1e-30)[..., None]).round()
