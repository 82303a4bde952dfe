"""Attention over float or INT8 caches, and writing them."""

from __future__ import annotations

import torch

from . import isa  # noqa: F401  (loads the native library)

_ops = torch.ops.ipex_quant


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
    """Softmax attention, ``[B, Lq, H, Dv]`` in the dtype of `query`; sums are float32.

    `query` is float32, bfloat16 or float16 ``[B, H, Lq, D]``; `key` ``[Bk, Hkv, T, D]`` and `value` ``[Bk, Hkv, T,
    Dv]`` have its dtype, or are int8 with the float32 scales ``[Bk, Hkv, T]`` that `write_cache` makes, not negative.
    ``H / Hkv`` heads share a KV head. All may have any strides; nothing is copied if the last dimension is adjacent.

    Query i is at position ``T - Lq + i``. `causal` hides what comes after it, a `window` above 0 also all but the last
    `window` tokens up to its own. `mask`, bool or added to the scores, broadcasts to ``[B, H, Lq, T]``. A `softcap` c
    above 0 makes a score s ``c * tanh(s / c)``; `alibi` float32 ``[H]`` adds ``slope * (token - position)``.
    `rows` int32 ``[B, T]`` says which row of `key` and `value` has each token of a sequence; without it Bk is B.

    A query to which everything is masked gets 0. Raises RuntimeError when an argument does not fit.
    """
    return _ops.attention(
        query, key, value, scale, causal, mask, window, softcap, alibi, key_scales, value_scales, rows
    )


def write_cache(key: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None, start: int) -> None:
    """Write the keys or values `key` ``[B, Hkv, L, D]`` into `cache` ``[B, Hkv, capacity, D]`` from token `start` on.

    An int8 cache gets symmetric codes with one scale for each token and head, in `scales` float32 ``[B, Hkv,
    capacity]``; a cache in the dtype of `key` takes None. Raises RuntimeError when an argument does not fit, with
    nothing written.
    """
    _ops.write_cache(key, cache, scales, start)


@torch.library.register_fake("ipex_quant::attention")
def _(query, key, value, scale, causal, mask, window, softcap, alibi, key_scales, value_scales, rows):
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3])


@torch.library.register_fake("ipex_quant::write_cache")
def _(key, cache, scales, start):
    return None
