"""Attention over a paged KV cache, whose blocks tables assign to sequences, as in vLLM (Kwon et al., 2023)."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from ... import ops
from .varlen import Options, attend, check_out, check_slopes, read_options, read_starts

KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e5m2")
"""Types of a cache: "auto" is the dtype of keys and values, the others FP8 with five bits of exponent."""


class PagedAttention:
    """Writes and reads a paged KV cache: one tensor ``[blocks, Hkv, block size, D]`` for keys and one for values.

    `reshape_and_cache` and `single_query_cached_kv_attention` also accept ``[blocks, block size, Hkv, D]``, as IPEX
    documents it, if block size and Hkv differ. Slot ``b * block size + i`` is token i of block b. Gradients do not
    pass.
    """

    @classmethod
    def reshape_and_cache(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str = "auto",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Write `key` ``[tokens, Hkv, D]`` and `value` ``[tokens, Hkv, Dv]`` into the slots ``[tokens]``; -1 skips one.

        An FP8 cache holds them divided by `k_scale` and `v_scale`. Raises ValueError or TypeError when an argument does
        not fit, IndexError for slots out of range; nothing is written then.
        """
        if key.dim() != 3 or value.dim() != 3 or key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"key, value: expected [tokens, Hkv, D] and [tokens, Hkv, Dv], got {list(key.shape)} and "
                f"{list(value.shape)}"
            )
        cache = _cache(key_cache, value_cache, key.shape[1], None)
        _check_type(kv_cache_dtype, cache)
        _check_cache(cache, key.dtype, (*key.shape[1:], value.shape[2]), (k_scale, v_scale))
        tokens, (blocks, _, block_size, _) = key.shape[0], cache.key.shape
        if slot_mapping.shape != (tokens,) or slot_mapping.is_floating_point():
            raise ValueError(
                f"slot_mapping: expected integers [{tokens}], got {slot_mapping.dtype} {list(slot_mapping.shape)}"
            )
        slots = slot_mapping.long()
        _check_range("slot_mapping", slots, -1, blocks * block_size - 1)
        scales = _scales(cache, (k_scale, v_scale))
        ops.write_paged_cache(key.detach(), value.detach(), *cache, slots, **scales)

    reshape_and_cache_flash = reshape_and_cache

    @classmethod
    def single_query_cached_kv_attention(
        cls,
        out: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        head_mapping: torch.Tensor,
        scale: float,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        block_size: int,
        max_context_len: int,
        alibi_slopes: torch.Tensor | None = None,
        window_size: int = -1,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        softcap: float = -1.0,
    ) -> torch.Tensor:
        """Attend with one query per sequence; write the result to `out` and return it.

        - `query` ``[sequences, H, D]``, in the dtype of the caches unless these are FP8; `out` ``[sequences, H, Dv]``.
        - `head_mapping` ``[H]``: the KV head of each head, ascending, each H / Hkv times.
        - `scale` multiplies the scores, in general ``D ** -0.5``.
        - `block_tables` ``[sequences, blocks]``, `context_lens` ``[sequences]``: integers, the blocks of each sequence
          and its number of tokens with the query's own, at most `max_context_len`. The result is 0 without tokens.
        - `window_size`: how many tokens a query sees, its own among them, -1 for all.
        - `softcap`: if above 0, the c of ``c * tanh(score / c)``. `alibi_slopes`: ``[H]``.

        Raises ValueError, TypeError or IndexError when an argument does not fit; nothing is written then.
        """
        cache = _cache(key_cache, value_cache, None, block_size)
        if cache.key.shape[2] != block_size:
            raise ValueError(f"block_size: expected {cache.key.shape[2]}, that of the cache, got {block_size}")
        if query.dim() != 3:
            raise ValueError(f"query: expected [sequences, H, D], got {list(query.shape)}")
        heads, kv_heads = query.shape[1], cache.key.shape[1]
        if not kv_heads or heads % kv_heads or head_mapping.shape != (heads,):
            raise ValueError(
                f"head_mapping: expected a KV head for each of {heads} heads, which the {kv_heads} KV heads of the "
                f"cache divide, got {list(head_mapping.shape)}"
            )
        group = heads // kv_heads
        if head_mapping.tolist() != [head // group for head in range(heads)]:
            raise ValueError(f"head_mapping: expected {group} heads for each KV head, got {head_mapping.tolist()}")
        slopes = check_slopes(alibi_slopes, heads)
        window = window_size - 1 if window_size > 0 else -1
        options = read_options(scale, True, (window, 0), softcap, slopes)
        starts = list(range(len(query) + 1))
        tables = _read_tables(cache, block_tables, context_lens, max_context_len)
        return _attend(out, query, starts, cache, tables, (k_scale, v_scale), options)

    @classmethod
    def flash_attn_varlen_func(
        cls,
        output: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_kv: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
        is_cusal: bool,
        block_tables: torch.Tensor,
        alibi_slopes: torch.Tensor | None = None,
        window_size_left: int = -1,
        window_size_right: int = -1,
        kv_cache_dtype: str = "auto",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        softcap: float = -1.0,
    ) -> torch.Tensor:
        """Attend with the last tokens of each sequence as queries; write the result to `output` and return it.

        `cu_seqlens_q` and `cu_seqlens_kv`, integers ``[sequences + 1]``, are the cumulative numbers of queries, in
        `query` ``[tokens, H, D]``, and of tokens of the sequences, from 0 on. The windows are the number of tokens that
        a query sees before and after itself, -1 for all. Otherwise as `single_query_cached_kv_attention`.
        """
        cache = _cache(key_cache, value_cache, None, None)
        if query.dim() != 3:
            raise ValueError(f"query: expected [tokens, H, D], got {list(query.shape)}")
        _check_type(kv_cache_dtype, cache)
        starts = read_starts("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
        last = int(cu_seqlens_kv[-1]) if cu_seqlens_kv.numel() else 0
        starts_kv = read_starts("cu_seqlens_kv", cu_seqlens_kv, last, max_seqlen_kv)
        if len(starts) != len(starts_kv):
            raise ValueError(f"cu_seqlens_q, cu_seqlens_kv: expected one length, got {len(starts)}, {len(starts_kv)}")
        tables = _read_tables(cache, block_tables, cu_seqlens_kv.diff(), max_seqlen_kv)
        slopes = check_slopes(alibi_slopes, query.shape[1])
        options = read_options(scale, is_cusal, (window_size_left, window_size_right), softcap, slopes)
        return _attend(output, query, starts, cache, tables, (k_scale, v_scale), options)

    flash_atten_varlen = flash_attn_varlen_func


class _Cache(NamedTuple):
    """Keys and values, ``[blocks, Hkv, block size, D]`` and ``[blocks, Hkv, block size, Dv]``."""

    key: torch.Tensor
    value: torch.Tensor


class _Tables(NamedTuple):
    """The blocks of every sequence, int32 ``[sequences, blocks]``, and the number of its tokens, ``[sequences]``."""

    blocks: torch.Tensor
    lengths: torch.Tensor


def _cache(key_cache: torch.Tensor, value_cache: torch.Tensor, kv_heads: int | None, block_size: int | None) -> _Cache:
    """The caches as ``[blocks, Hkv, block size, D]``, transposed if `kv_heads` or `block_size` fits only then."""
    cache = _Cache(key_cache, value_cache)
    if any(tensor.dim() != 4 or not tensor.shape[2] for tensor in cache):
        raise ValueError(
            f"key_cache, value_cache: expected [blocks, Hkv, block size, D], got {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}"
        )
    _, one, two, _ = key_cache.shape
    swapped = (two == kv_heads and one != kv_heads) or (one == block_size and two != block_size)
    return _Cache(*(tensor.transpose(1, 2) for tensor in cache)) if swapped else cache


def _check_cache(cache: _Cache, dtype: torch.dtype, sizes: tuple[int, int, int], scales: tuple[float, float]) -> None:
    """Raise unless `cache` has the `sizes` Hkv, D and Dv and holds `dtype`, with `scales` of 1, or FP8."""
    heads, key_dim, value_dim = sizes
    blocks, _, block_size, _ = cache.key.shape
    shapes = (blocks, heads, block_size, key_dim), (blocks, heads, block_size, value_dim)
    if (cache.key.shape, cache.value.shape) != shapes:
        raise ValueError(
            f"key_cache, value_cache: expected {list(shapes[0])} and {list(shapes[1])}, got {list(cache.key.shape)} "
            f"and {list(cache.value.shape)}"
        )
    if cache.key.dtype != cache.value.dtype or cache.key.dtype not in (dtype, torch.float8_e5m2):
        raise TypeError(
            f"key_cache, value_cache: expected {dtype} or float8_e5m2, got {cache.key.dtype} and {cache.value.dtype}"
        )
    if cache.key.dtype == dtype and any(float(scale) != 1.0 for scale in scales):
        raise ValueError(f"k_scale, v_scale: expected 1.0 for a cache that is not FP8, got {scales[0]}, {scales[1]}")


def _check_type(kv_cache_dtype: str, cache: _Cache) -> None:
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise TypeError(f"unsupported kv_cache_dtype: expected one of {list(KV_CACHE_DTYPES)}, got {kv_cache_dtype!r}")
    if kv_cache_dtype != "auto" and cache.key.dtype != torch.float8_e5m2:
        raise TypeError(f"kv_cache_dtype {kv_cache_dtype!r}: only float8_e5m2 supported, got {cache.key.dtype}")


def _check_range(name: str, numbers: torch.Tensor, low: int, high: int) -> None:
    if numbers.numel() and (int(numbers.min()) < low or int(numbers.max()) > high):
        raise IndexError(f"{name}: expected {low}..{high}, got {int(numbers.min())}..{int(numbers.max())}")


def _read_tables(cache: _Cache, block_tables: torch.Tensor, lengths: torch.Tensor, longest: int) -> _Tables:
    """The blocks and length of each sequence; raises if a table is too short or has a block out of range."""
    for name, tensor, dimensions in (("block_tables", block_tables, 2), ("context_lens", lengths, 1)):
        if tensor.dim() != dimensions or tensor.is_floating_point():
            raise ValueError(f"{name}: expected {dimensions}-D integers, got {tensor.dtype} {list(tensor.shape)}")
    if len(block_tables) != len(lengths):
        raise ValueError(f"block_tables: expected a row for each of {len(lengths)} sequences, got {len(block_tables)}")
    _check_range("context_lens", lengths, 0, int(longest))
    blocks, _, block_size, _ = cache.key.shape
    lengths = lengths.long()
    counts = (lengths + block_size - 1) // block_size
    width = block_tables.shape[1]
    if len(counts) and int(counts.max()) > width:
        raise ValueError(
            f"block_tables: expected {int(counts.max())} blocks of {block_size} for {int(lengths.max())} tokens, got "
            f"{width}"
        )
    used = torch.arange(width) < counts[:, None]
    _check_range("block_tables", block_tables[used], 0, blocks - 1)
    return _Tables(block_tables.int(), lengths)


def _attend(
    out: torch.Tensor,
    query: torch.Tensor,
    starts: list[int],
    cache: _Cache,
    tables: _Tables,
    scales: tuple[float, float],
    options: Options,
) -> torch.Tensor:
    """Attention of the queries ``starts[i]`` to ``starts[i + 1]`` to sequence i, written to `out`."""
    check_out(out, query, cache.value.shape[3])
    if len(tables.lengths) != len(starts) - 1:
        raise ValueError(f"context_lens: expected {len(starts) - 1} sequences, got {len(tables.lengths)}")
    kv_heads = cache.key.shape[1]
    _check_cache(cache, query.dtype, (kv_heads, query.shape[2], cache.value.shape[3]), scales)
    if not kv_heads or query.shape[1] % kv_heads:
        raise ValueError(
            f"query: expected heads that the {kv_heads} KV heads of the cache divide, got {query.shape[1]}"
        )
    query = query.detach()
    if options.native:
        arguments = options.arguments() | _scales(cache, scales)
        result = ops.paged_attention(query, *cache, *tables, torch.tensor(starts), **arguments)
    else:
        keys, values = (_tokens(each, tables, query.dtype, scale) for each, scale in zip(cache, scales, strict=True))
        result = attend((query, keys, values), (starts, [0, *accumulate(tables.lengths.tolist())]), options)
    return out.copy_(result)


def _scales(cache: _Cache, scales: tuple[float, float]) -> dict[str, torch.Tensor]:
    """Arguments of the native ops: the scales of keys and values in an FP8 cache."""
    if cache.key.dtype != torch.float8_e5m2:
        return {}
    key, value = (torch.tensor([float(scale)]) for scale in scales)
    return {"key_scales": key, "value_scales": value}


def _tokens(cache: torch.Tensor, tables: _Tables, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Keys or values of all sequences, ``[tokens, Hkv, D]``."""
    block_size = cache.shape[2]
    places = torch.arange(tables.blocks.shape[1] * block_size)
    blocks = tables.blocks.long().repeat_interleave(block_size, dim=1)
    used = places < tables.lengths[:, None]
    states = cache[blocks[used], :, (places % block_size).expand_as(used)[used]]
    return states if states.dtype == dtype else (states.float() * scale).to(dtype)
