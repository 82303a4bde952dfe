"""Attention over a KV cache that beam search does not reorder: an index of the beams' history says what to read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ... import ops

LayerPast = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def indirect_access_kv_cache_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale_attn: float,
    layer_past: LayerPast | None = None,
    head_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    add_casual_mask: bool = True,
    seq_info: torch.Tensor | None = None,
    text_max_length: int = 0,
) -> tuple[torch.Tensor, None, LayerPast]:
    """Append keys and values to the cache and attend to all of it, over the path that each beam took.

    - `query` ``[B, L, H, D]``, `key` ``[B, L, Hkv, D]``, `value` ``[B, L, Hkv, Dv]``: of one dtype, float32, bfloat16
      or float16; Hkv divides H.
    - `scale_attn` divides the scores: in general the square root of D.
    - `layer_past`: the last element of the last call's result, or None. With a `seq_info` of no tokens only the width
      of its `beam_idx` counts: the number of rows (all beams of all sequences) of the new cache.
    - `attention_mask`: bool or added to the scores, broadcasts to ``[B, H, L, T]``, where T counts the past as well.
    - `alibi`: slopes ``[H]``, or a bias to add to the scores, ``[B * H, 1 or L, T]`` or four dimensions.
    - `add_casual_mask`: whether a query sees nothing after itself, in addition to `attention_mask`.
    - `seq_info` replaces that in `layer_past`. `head_mask` is not supported.
    - `text_max_length`: the capacity, in tokens, of a new cache.

    Returns the result ``[B, H, L, Dv]``, None, and ``(seq_info, key_cache, value_cache, beam_idx)``. The shape
    ``[1, T, T, 1]`` of `seq_info` gives the number of tokens T; the caches are ``[capacity, rows, Hkv, D or Dv]``, and
    `beam_idx`, int64 ``[capacity + 1, rows]``, is the cache row of each token for each beam. The prompt of a sequence
    is stored once for all its beams. Beam search writes the parent of each beam to ``beam_idx[T - 1]``, and the next
    call applies it to all tokens before. Caches and `beam_idx` are written in place, and reallocated when full.

    IPEX instead ignores the cache and causality without an `attention_mask`, and ignores `alibi`. Gradients do not
    pass. Raises ValueError or TypeError when an argument does not fit; nothing is written then.
    """
    if head_mask is not None:
        raise ValueError("head_mask: expected None, got a tensor; it is not supported, leave whole heads out instead")
    if scale_attn <= 0:
        raise ValueError(f"scale_attn: expected a divisor above 0, such as sqrt(head_dim), got {scale_attn}")
    _check_states(query, key, value)
    query, key, value = query.detach(), key.detach(), value.detach()
    past = _read_past(layer_past, seq_info, key, value)
    length = past.length + key.shape[1]
    batch, queries, heads, _ = query.shape
    mask, slopes = _bias(attention_mask, alibi, (batch, heads, queries, length))
    past = _grown(past, length, text_max_length)
    rows = _append(past, key, value)
    if rows is None:
        key, value = (state.transpose(1, 2) for state in (key, value))
    else:
        key, value = (cache[:length].permute(1, 2, 0, 3) for cache in (past.key, past.value))
    output = ops.attention(
        query.transpose(1, 2),
        key,
        value,
        scale=1.0 / scale_attn,
        causal=add_casual_mask,
        mask=mask,
        alibi=slopes,
        rows=rows,
    )
    present = torch.zeros(1, 1, 1, 1, dtype=torch.long).expand(1, length, length, 1)
    return output.transpose(1, 2), None, (present, past.key, past.value, past.beam_idx)


class IndirectAccessKVCacheAttention(nn.Module):
    """Attention with a KV cache that is allocated for `text_max_length` tokens, and doubled when it is full."""

    def __init__(self, text_max_length: int = 2048) -> None:
        super().__init__()
        self.text_max_length = text_max_length

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale_attn: float,
        layer_past: LayerPast | None = None,
        head_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        alibi: torch.Tensor | None = None,
        add_casual_mask: bool = True,
        seq_info: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None, LayerPast]:
        """`ipex_quant.llm.functional.indirect_access_kv_cache_attention`."""
        options = (head_mask, attention_mask, alibi, add_casual_mask, seq_info, self.text_max_length)
        return indirect_access_kv_cache_attention(query, key, value, scale_attn, layer_past, *options)

    apply_function = staticmethod(indirect_access_kv_cache_attention)

    def extra_repr(self) -> str:
        return f"text_max_length={self.text_max_length}"


class _Past(NamedTuple):
    """A cache of `length` tokens; the last row of `beam_idx` has the cache row where the last call wrote each beam."""

    length: int
    key: torch.Tensor
    value: torch.Tensor
    beam_idx: torch.Tensor


def _check_states(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    shapes = [list(state.shape) for state in (query, key, value)]
    fits = all(len(shape) == 4 for shape in shapes) and shapes[1][:3] == shapes[2][:3]
    if (
        not fits
        or shapes[0][:2] != shapes[1][:2]
        or shapes[0][3] != shapes[1][3]
        or not shapes[1][2]
        or shapes[0][2] % shapes[1][2]
    ):
        raise ValueError(
            "query, key, value: expected [B, L, H, D], [B, L, Hkv, D] and [B, L, Hkv, Dv], where Hkv divides H, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")


def _read_past(
    layer_past: LayerPast | None, seq_info: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor
) -> _Past:
    """`layer_past`, checked; if it holds no tokens, with caches of capacity 0."""
    batch, _, heads, _ = key.shape
    if layer_past is not None and len(layer_past) != 4:
        raise ValueError(f"layer_past: expected (seq_info, key_cache, value_cache, beam_idx), got {len(layer_past)}")
    if seq_info is None and layer_past is not None:
        seq_info = layer_past[0]
    if seq_info is not None and seq_info.dim() != 4:
        raise ValueError(f"seq_info: expected four dimensions, [1, T, T, 1], got {list(seq_info.shape)}")
    length = 0 if layer_past is None or seq_info is None else seq_info.shape[-2]
    rows = batch
    if layer_past is not None and (length > 0 or layer_past[3].shape[0] > 1):  # a `beam_idx` of one row is a dummy
        rows = layer_past[3].shape[-1]
    if not batch or rows % batch:
        raise ValueError(
            f"query: expected one row for each of the {rows} of the cache, or for every beam group, got {batch}"
        )
    if layer_past is None or length == 0:
        keys, values = (state.new_empty(0, rows, heads, state.shape[3]) for state in (key, value))
        return _Past(0, keys, values, torch.empty(1, rows, dtype=torch.long))
    _, key_cache, value_cache, beam_idx = layer_past
    capacity = key_cache.shape[0]
    for name, cache, state in (("key_cache", key_cache, key), ("value_cache", value_cache, value)):
        if cache.shape != (capacity, rows, heads, state.shape[3]) or cache.dtype != state.dtype:
            raise ValueError(
                f"{name}: expected [{capacity}, {rows}, {heads}, {state.shape[3]}] in {state.dtype}, got "
                f"{list(cache.shape)} in {cache.dtype}"
            )
    if beam_idx.shape != (capacity + 1, rows) or beam_idx.dtype != torch.long or length > capacity:
        raise ValueError(
            f"layer_past: expected beam_idx int64 [{capacity + 1}, {rows}] and at most {capacity} tokens, got "
            f"{beam_idx.dtype} {list(beam_idx.shape)} and {length} tokens"
        )
    last = beam_idx[length - 1]
    if int(last.min()) < 0 or int(last.max()) >= rows:
        raise ValueError(f"beam_idx: expected rows 0..{rows - 1} for token {length - 1}, got {last.tolist()}")
    return _Past(length, key_cache, value_cache, beam_idx)


def _bias(
    mask: torch.Tensor | None, alibi: torch.Tensor | None, shape: tuple[int, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask ``[B, H, L, T]``, with the bias in `alibi` added, and the slopes in `alibi`; each may be None."""
    if mask is not None:
        _check_broadcasts("attention_mask", mask, shape)
    if alibi is None:
        return mask, None
    if alibi.dim() == 1:
        if alibi.shape[0] != shape[1]:
            raise ValueError(f"alibi: expected a slope for each of {shape[1]} heads, got {alibi.shape[0]}")
        return mask, alibi.float()
    if alibi.dim() == 3 and alibi.shape[0] == shape[0] * shape[1]:
        alibi = alibi.unflatten(0, shape[:2])
    _check_broadcasts("alibi", alibi, shape)
    if mask is None:
        return alibi, None
    if mask.dtype == torch.bool:
        return torch.where(mask, alibi.float(), float("-inf")), None
    return mask.float() + alibi.float(), None


def _check_broadcasts(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dim() != 4 or any(size not in (1, full) for size, full in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected four dimensions that broadcast to {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != torch.bool and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected bool or float, got {tensor.dtype}")


def _grown(past: _Past, length: int, text_max_length: int) -> _Past:
    """`past` with a capacity of at least `length` tokens."""
    capacity = past.key.shape[0]
    if length <= capacity:
        return past
    wanted = max(length, text_max_length if past.length == 0 else 2 * capacity)
    key, value = (cache.new_empty(wanted, *cache.shape[1:]) for cache in (past.key, past.value))
    beam_idx = past.beam_idx.new_zeros(wanted + 1, past.beam_idx.shape[1])
    for new, old in ((key, past.key), (value, past.value), (beam_idx, past.beam_idx)):
        new[: past.length] = old[: past.length]
    beam_idx[-1] = past.beam_idx[-1]
    return _Past(past.length, key, value, beam_idx)


def _append(past: _Past, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """Write the new tokens; return the row of every token for every query, int32 ``[B, T]``, None without a past."""
    start, stop = past.length, past.length + key.shape[1]
    rows = past.beam_idx.shape[1]
    beams = rows // key.shape[0]
    leaders = slice(None, None, beams)
    if start > 0:  # the parents of the beams apply to all tokens before
        parents = past.beam_idx[start - 1].clone()
        past.beam_idx[: start - 1] = past.beam_idx[: start - 1, parents]
        past.beam_idx[start - 1] = past.beam_idx[-1, parents]
    past.key[start:stop, leaders] = key.transpose(0, 1)
    past.value[start:stop, leaders] = value.transpose(0, 1)
    written = torch.arange(rows) // beams * beams
    past.beam_idx[start:stop] = written
    past.beam_idx[-1] = written
    return past.beam_idx[:stop, leaders].t().to(torch.int32).contiguous() if start > 0 else None
