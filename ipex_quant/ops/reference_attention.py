"""Plain-torch definitions of attention and its caches: the oracle of the ops' tests, written to be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .reference import MIN_RANGE
from .reference_llm import rotary

LOWEST_MASK = -(2.0**126)
"""A finite mask below this value counts as this value."""


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
    dropout: float = 0.0,
    block: int | None = None,
    rounding: Callable[[torch.Tensor], torch.Tensor] = torch.round,
) -> torch.Tensor:
    """As `ipex_quant.ops.attention`, in float64 up to the last rounding, and with dropout of the probabilities.

    A float8 cache is multiplied by its scales, if there are any. With an int8 cache, queries are quantized like keys
    (`quantize_token`), and probabilities times the value scales become 8-bit codes by `rounding`, in blocks of `block`
    tokens, by default the blocks of a call with only these sequences. The gradient ignores that rounding.
    """
    dtype, (queries, tokens), group = query.dtype, (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    if key.dtype == torch.float8_e5m2:
        key, value = _restored(key, key_scales), _restored(value, value_scales)
        key_scales = value_scales = None
    key, value = (_gathered(cache, rows).repeat_interleave(group, 1) for cache in (key, value))
    if key_factors is not None:
        query = query.float() * key_factors.repeat_interleave(group, 0)[:, None]
    if key_scales is None or value_scales is None:
        query = query.double()
    else:
        query = _dequantized(*quantize_token(query))
        key_scales, value_scales = (
            _gathered(scales[..., None], rows)[..., 0].repeat_interleave(group, 1)
            for scales in (key_scales, value_scales)
        )
        key = _dequantized(key, key_scales)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(tokens) - torch.arange(tokens - queries, tokens)[:, None]  # of a token from its query
    if alibi is not None:
        scores = scores + alibi.double()[:, None, None] * distance
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + _finite(mask)
    if causal or window:
        scores = scores.masked_fill(distance > 0, -math.inf)
    if window:
        scores = scores.masked_fill(distance <= -window, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(nothing, 0.0)
    if value_scales is not None:
        blocks = block_numbers(queries, tokens, group, window, block or block_tokens(queries * group))
        weights = _rounded(weights * value_scales[:, :, None], blocks.repeat(key.shape[1] // group, 1, 1), rounding)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2).to(dtype)


TASK_ROWS = 96
"""Most query rows of a task; the queries of all heads that share a KV head are divided evenly into tasks."""


def block_tokens(rows: int) -> int:
    """Number of tokens in a block, where each KV head has at most `rows` query rows in a sequence of the call."""
    return 64 if 8 < rows <= 16 else 128


def block_numbers(queries: int, tokens: int, group: int, window: int, block: int) -> torch.Tensor:
    """Block number of each token for each query, ``[group, queries, tokens]``; 0 for tokens before the first block.

    The blocks of a task begin at the first token that its first query sees.
    """
    rows = queries * group
    tasks = -(-rows // TASK_ROWS)
    first_rows = torch.arange(tasks) * rows // max(tasks, 1)
    begins = (tokens - queries + 1 - (window or tokens + 1) + first_rows // group).clamp(min=0)
    task_of_row = torch.searchsorted(first_rows, torch.arange(rows), right=True) - 1
    numbers = (torch.arange(tokens) - begins[task_of_row][:, None]).clamp(min=0) // block
    return numbers.view(queries, group, tokens).transpose(0, 1)


def _rounded(
    weights: torch.Tensor, blocks: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`weights` rounded to multiples of 1/255 of the largest in their block."""
    index = blocks.expand_as(weights)
    largest = weights.new_zeros(*weights.shape[:-1], weights.shape[-1] + 1).scatter_reduce(-1, index, weights, "amax")
    step = largest.gather(-1, index) / 255
    rounded = torch.where(step == 0, 0.0, rounding(weights / step) * step)
    return weights + (rounded - weights).detach()


def _dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.double() * scales[..., None].double()


def _restored(cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return cache.double() if scale is None else cache.double() * scale.double()


def _finite(mask: torch.Tensor) -> torch.Tensor:
    """The mask in float64, with finite values raised to `LOWEST_MASK`: float32 scores plus these stay finite."""
    return torch.where(mask == -math.inf, -math.inf, mask.double().clamp(min=LOWEST_MASK))


def _gathered(cache: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The keys or values of each sequence's tokens, in float64; `rows` is as in `attention`."""
    if rows is None:
        return cache.double()
    return cache.double().transpose(1, 2)[rows, torch.arange(cache.shape[2])].transpose(1, 2)


def quantize_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of `x` and float32 scales, one for each vector along the last dimension."""
    floats = x.float()
    largest = floats.abs().amax(-1)
    inverse = torch.where(largest >= MIN_RANGE, torch.full_like(largest, 127) / largest, 0.0)
    return (floats * inverse[..., None]).round().clamp(-127, 127).to(torch.int8), largest / 127


def write_cache(
    key: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    start: int,
    factors: torch.Tensor | None = None,
) -> None:
    """As `ipex_quant.ops.write_cache`."""
    place = slice(start, start + key.shape[2])
    if cache.dtype == torch.float8_e5m2:
        cache[:, :, place] = (key.float() if scales is None else key.float() / scales).to(cache.dtype)
    elif scales is None:
        cache[:, :, place] = key
    else:
        cache[:, :, place], scales[:, :, place] = quantize_token(
            key if factors is None else key.float() / factors[:, None]
        )


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
    rotary_dim: int | None = None,
    interleaved: bool = False,
    key_factors: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """As `ipex_quant.ops.fused_rope_attention`."""
    kv_heads, dim = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.shape[2] // dim - 2 * kv_heads
    states = qkv.unflatten(2, (-1, dim))
    rotated = rotary(states[:, :, : heads + kv_heads], cos, sin, rotary_dim, interleaved).transpose(1, 2)
    write_cache(rotated[:, heads:], key_cache, key_scales, start, key_factors)
    write_cache(states[:, :, heads + kv_heads :].transpose(1, 2), value_cache, value_scales, start)
    end = start + qkv.shape[1]
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        options[name] = scales if scales is None or scales.dim() == 1 else scales[:, :, :end]
    options["key_factors"] = key_factors
    result = attention(rotated[:, :heads], key_cache[:, :, :end], value_cache[:, :, :end], causal=True, **options)
    return result.flatten(2)


def write_paged_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """As `ipex_quant.ops.write_paged_cache`."""
    for states, cache, scales in ((key, key_cache, key_scales), (value, value_cache, value_scales)):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                block, place = divmod(slot, cache.shape[2])
                row = states[None, token, :, None]
                own = scales if scales is None or scales.dim() == 1 else scales[block : block + 1]
                write_cache(row, cache[block : block + 1], own, place)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    causal: bool = True,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """As `ipex_quant.ops.paged_attention`, one sequence at a time."""
    rows = int(query_starts.diff().max()) * query.shape[1] // key_cache.shape[1] if len(lengths) else 0
    options |= {"causal": causal, "block": block_tokens(rows)}
    results = []
    for i, (blocks, length) in enumerate(zip(block_tables, lengths.tolist(), strict=True)):
        queries = query[query_starts[i] : query_starts[i + 1]]
        key, value = (_of_blocks(cache, blocks, length) for cache in (key_cache, value_cache))
        for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
            options[name] = scales if scales is None or scales.dim() == 1 else _of_blocks(scales, blocks, length)
        results.append(attention(queries.transpose(0, 1)[None], key, value, **options)[0])
    return torch.cat(results)


def _of_blocks(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of one sequence, ``[1, Hkv, length, ...]``, from the blocks of a paged cache."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]


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
    rotary_dim: int | None = None,
    interleaved: bool = False,
    **options: Any,
) -> torch.Tensor:
    """As `ipex_quant.ops.paged_rope_attention`."""
    kv_heads, page, dim = key_cache.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    states = qkv.unflatten(1, (-1, dim))
    rotated = rotary(states[None, :, : heads + kv_heads], cos, sin, rotary_dim, interleaved)[0]
    slots = []
    for blocks, length, count in zip(*(each.tolist() for each in (*pages[:2], pages[2].diff())), strict=True):
        slots += [blocks[i // page] * page + i % page for i in range(length - count, length)]
    new = rotated[:, heads:], states[:, heads + kv_heads :]
    write_paged_cache(*new, key_cache, value_cache, torch.tensor(slots), key_scales, value_scales)
    options |= {"key_scales": key_scales, "value_scales": value_scales}
    return paged_attention(rotated[:, :heads], key_cache, value_cache, *pages, **options).flatten(1)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """As `ipex_quant.ops.varlen_attention`, one sequence at a time."""
    results = []
    for i in range(len(query_starts) - 1):
        parts = [query[query_starts[i] : query_starts[i + 1]]]
        parts += [x[key_starts[i] : key_starts[i + 1]] for x in (key, value)]
        results.append(attention(*(x.transpose(0, 1)[None] for x in parts), **options)[0])
    return torch.cat(results)
