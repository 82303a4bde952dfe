"""Attention over float, INT8 or FP8 KV caches, and writes to these caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .fakes import check_shape, register_fake
from .library import native


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
    key_factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention; returns ``[B, Lq, H, Dv]`` in the dtype of `query`, summed in float32.

    `query` is float32, bfloat16 or float16 ``[B, H, Lq, D]``; `key` ``[Bk, Hkv, T, D]`` and `value` ``[Bk, Hkv, T,
    Dv]`` have its dtype, or are int8 with nonnegative float32 scales ``[Bk, Hkv, T]``, as `write_cache` writes them, or
    float8_e5m2, which `key_scales` and `value_scales`, float32 ``[1]``, multiply if they are given. ``H / Hkv`` query
    heads share a KV head. Tensors may have any strides; none is copied if its last dimension is contiguous.

    With an int8 cache, queries are multiplied by `key_factors`, float32 ``[Hkv, D]`` or None, and quantized with one
    scale per token and head; probabilities times the value scales are quantized to 8 bits relative to the largest in a
    block of at most 128 tokens. Both matmuls are then exact in integers.

    Query i is at position ``T - Lq + i``. `causal` hides later tokens; a `window` above 0 hides these and all but the
    last `window` tokens up to the query's own. `mask`, bool (True is visible) or added to the scores, broadcasts to
    ``[B, H, Lq, T]``. A `softcap` c above 0 turns a score s into ``c * tanh(s / c)``; `alibi` float32 ``[H]`` adds
    ``slope * (token - position)``. `rows` int32 ``[B, T]`` is the row of `key` and `value` that holds each token of a
    sequence; without it Bk is B.

    A query whose tokens are all hidden or masked by False or -inf gets 0. A finite mask below ``-2 ** 126`` counts as
    ``-2 ** 126``; a query whose visible tokens all have such a mask gets the mean of their values, as in torch. Raises
    RuntimeError when an argument does not fit.
    """
    return native.attention.default(
        query, key, value, scale, causal, mask, window, softcap, alibi, key_scales, value_scales, rows, key_factors
    )


def write_cache(
    key: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    start: int,
    factors: torch.Tensor | None = None,
) -> None:
    """Write the keys or values `key` ``[B, Hkv, L, D]`` into `cache` ``[B, Hkv, capacity, D]`` from token `start` on.

    An int8 cache gets symmetric codes, and `scales`, float32 ``[B, Hkv, capacity]``, one scale per token and head;
    `factors`, float32 ``[Hkv, D]`` or None, divide `key` before. A float8_e5m2 cache holds `key` divided by `scales`,
    float32 ``[1]``, which is read, or None. A cache in the dtype of `key` takes None for both.
    Raises RuntimeError when an argument does not fit, with nothing written.
    """
    native.write_cache.default(key, cache, scales, start, factors)


def fused_rope_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    *,
    start: int,
    scale: float,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    mask: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
    key_factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `rotary` on queries and keys, `write_cache` from token `start` on, then causal `attention` over the cache.

    `qkv` is ``[B, L, (H + 2 * Hkv) * D]``: all queries, then keys, then values. The caches are ``[B, Hkv, capacity,
    D]`` in its dtype, int8 with scales ``[B, Hkv, capacity]``, or float8_e5m2 with scales ``[1]`` or None; `mask`
    broadcasts to ``[B, H, L, start + L]``; the other arguments are those of the three ops. Returns ``[B, L, H * D]``.
    Raises RuntimeError when an argument does not fit, with nothing written.
    """
    rotary_dim = key_cache.shape[-1] if rotary_dim is None else rotary_dim
    return native.fused_rope_attention.default(
        qkv,
        cos,
        sin,
        rotary_dim,
        interleaved,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        start,
        scale,
        mask,
        window,
        softcap,
        alibi,
        key_factors,
    )


def write_paged_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write `key` and `value` ``[tokens, Hkv, D]`` into paged caches ``[blocks, Hkv, block_size, D]``.

    `slots`, int32 or int64 ``[tokens]``, are ``block * block_size + index in the block``; -1 skips a token. An int8
    cache has scales float32 ``[blocks, Hkv, block_size]``, a float8_e5m2 one ``[1]`` or None. Raises RuntimeError when
    an argument does not fit, with nothing written.
    """
    native.write_paged_cache.default(key, value, key_cache, value_cache, key_scales, value_scales, slots)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` of a batch of sequences over the blocks of a paged cache, as `write_paged_cache` fills it.

    Rows ``query_starts[b]`` to ``query_starts[b + 1]`` of `query` ``[tokens, H, D]`` are the queries of the last tokens
    of sequence b. The sequence has ``lengths[b]`` tokens, in the blocks ``block_tables[b]``, int32 ``[B, blocks]``;
    `lengths` and `query_starts` are int32 or int64. Returns ``[tokens, H, Dv]``. Raises RuntimeError when an argument
    does not fit.
    """
    return native.paged_attention.default(
        query,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        block_tables,
        lengths,
        query_starts,
        scale,
        causal,
        window,
        softcap,
        alibi,
    )


def paged_rope_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    pages: Sequence[torch.Tensor],
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    *,
    scale: float,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `rotary` on queries and keys, write keys and values to their blocks, then causal `paged_attention`.

    `qkv` is ``[tokens, (H + 2 * Hkv) * D]``, all queries, then keys, then values of the last tokens of every sequence,
    prompts and single tokens in any mix; `cos` and `sin` are ``[1, tokens, columns]``. `pages` are the `block_tables`,
    `lengths`, these tokens included, and `query_starts` of `paged_attention`: token i of the last L of a sequence is
    written to position ``length - L + i``. The other arguments are those of the three ops. Returns ``[tokens, H * D]``.
    Raises RuntimeError when an argument does not fit, with nothing written.
    """
    rotary_dim = key_cache.shape[-1] if rotary_dim is None else rotary_dim
    return native.paged_rope_attention.default(
        qkv,
        cos,
        sin,
        rotary_dim,
        interleaved,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        *pages,
        scale,
        window,
        softcap,
        alibi,
    )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` within each of several concatenated sequences.

    `query` is ``[tokens, H, D]``, `key` and `value` ``[key tokens, Hkv, D]`` in its dtype. Sequence b has the rows
    ``query_starts[b]`` to ``query_starts[b + 1]`` and ``key_starts[b]`` to ``key_starts[b + 1]``, int32 or int64; its
    last query is at the position of its last key. Returns ``[tokens, H, Dv]``. Raises RuntimeError when an argument
    does not fit.
    """
    return native.varlen_attention.default(
        query, key, value, query_starts, key_starts, scale, causal, window, softcap, alibi
    )


@register_fake("attention")
def _(query, key, value, *options):
    check_shape("query", query, "[B, H, Lq, D]")
    check_shape("key", key, "[Bk, Hkv, T, D]")
    check_shape("value", value, "[Bk, Hkv, T, Dv]")
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3])


@register_fake("write_cache")
def _(key, cache, scales, start, factors=None):
    check_shape("key", key, "[B, Hkv, L, D]")
    check_shape("cache", cache, "[B, Hkv, capacity, D]")


@register_fake("fused_rope_attention")
def _(qkv, cos, sin, rotary_dim, interleaved, key_cache, value_cache, *options):
    check_shape("qkv", qkv, "[B, L, (H + 2 * Hkv) * D]")
    check_shape("key_cache", key_cache, "[B, Hkv, capacity, D]")
    _, heads, _, dim = key_cache.shape
    return qkv.new_empty(*qkv.shape[:2], (qkv.shape[2] // dim - 2 * heads) * dim)


@register_fake("write_paged_cache")
def _(key, value, key_cache, value_cache, key_scales, value_scales, slots):
    check_shape("key", key, "[tokens, Hkv, D]")
    check_shape("value", value, "[tokens, Hkv, D]")


@register_fake("paged_attention")
def _(query, key_cache, value_cache, *options):
    check_shape("query", query, "[tokens, H, D]")
    check_shape("value_cache", value_cache, "[blocks, Hkv, block, Dv]")
    return query.new_empty(*query.shape[:2], value_cache.shape[3])


@register_fake("paged_rope_attention")
def _(qkv, cos, sin, rotary_dim, interleaved, key_cache, *options):
    check_shape("qkv", qkv, "[tokens, (H + 2 * Hkv) * D]")
    check_shape("key_cache", key_cache, "[blocks, Hkv, block, D]")
    _, heads, _, dim = key_cache.shape
    return qkv.new_empty(qkv.shape[0], (qkv.shape[1] // dim - 2 * heads) * dim)


@register_fake("varlen_attention")
def _(query, key, value, *options):
    check_shape("query", query, "[tokens, H, D]")
    check_shape("value", value, "[key tokens, Hkv, Dv]")
    return query.new_empty(*query.shape[:2], value.shape[2])
