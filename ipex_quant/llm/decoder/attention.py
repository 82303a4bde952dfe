"""Attention of a lean decoder layer: projections, rotation, KV cache and output projection in few native calls."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ...nn.linears import is_linear, linear_shape
from ...ops import PostOp
from ..attention import attention_forward, with_bias
from ..cache.layers import NativeLayer
from ..cache.storage import Storage, attend
from .call import LayerCall
from .families import Attention, Layout, Rope
from .linears import linear_call, linear_calls
from .norms import Norm, Scale, norm_of


class UnsuitableError(Exception):
    """Raised for a layer that does not match the description of its family."""


def part(module: nn.Module, path: str, *default: Any) -> Any:
    try:
        return attrgetter(path)(module) if path else module
    except AttributeError:
        if default:
            return default[0]
        raise UnsuitableError(f"{type(module).__name__} has no {path}") from None


def norm_part(module: nn.Module, path: str) -> Norm | Scale:
    found = part(module, path)
    norm = Scale(found) if isinstance(found, (int, float)) else norm_of(found)
    if norm is None:
        raise UnsuitableError(f"{path} is no norm that is known")
    return norm


MAX_JOINED = 8
"""Tokens for which it costs less to join queries, keys and values in one tensor than to rotate and store them apart."""

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries ``[B, L, H, D]``, keys and values ``[B, L, Hkv, D]``."""


class Slots(NamedTuple):
    """Reserved slots of a cache layer: its buffers, in which the next keys and values go from `start` on."""

    layer: NativeLayer
    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    key_factors: torch.Tensor | None
    start: int


class FusedAttention:
    """Projections, rotation, KV cache, attention and output projection of one layer."""

    def __init__(self, module: nn.Module, names: Attention) -> None:
        self.module = module
        self.names = names
        self.layer_index = part(module, names.index)
        projections = [part(module, name) for name in names.projections]
        output = part(module, names.output)
        self.project = linear_calls(projections)
        self.output = linear_call(output)
        self.split = _SPLITS[names.layout]
        self.head_size = part(module, names.head_size)
        self.heads = _features(output)[1] // self.head_size
        self.key_heads = (sum(_features(each)[0] for each in projections) // self.head_size - self.heads) // 2
        self.scale = part(module, names.scale, self.head_size**-0.5)
        self.softcap = part(module, names.softcap) or 0.0 if names.softcap else 0.0
        self.clip = part(module, names.clip) if names.clip else None
        self.norms = [norm_part(module, name) for name in names.norms]
        self.rope = _ROPES[names.rope]
        self.interleaved = names.rope not in (Rope.NONE, Rope.HALF)
        blocks = names.layout == Layout.BLOCKS or (names.layout == Layout.GROUPS and self.key_heads == 1)
        self.in_blocks = blocks or names.layout == Layout.SEPARATE
        by_heads = self.norms and not names.joint_norms
        self.joins = not by_heads and self.in_blocks
        self.is_joined = not by_heads and blocks
        self.is_causal = getattr(module, "is_causal", True)
        self.slopes = alibi_slopes(self.heads) if names.alibi else None

    def __call__(
        self, x: torch.Tensor, call: LayerCall, post_op: PostOp = PostOp.NONE, *others: torch.Tensor
    ) -> torch.Tensor:
        mask = call.mask
        slots = self.reserve(x, call) if call.cache is not None else None
        if slots is not None and self.names.position_bias:
            mask = with_bias(mask, self.position_bias(call, 1, slots.start + 1))
        projected = self.project(x)
        if self.clip:
            projected = [each.clamp(-self.clip, self.clip) for each in projected]
        if self.norms and self.names.joint_norms:
            query, key, value = projected
            projected = [self.norms[0](query), self.norms[1](key), value]
        if slots is not None and self.fits_one_call(x, mask):
            attended = self.rotate_and_attend(self.join(projected, *x.shape[:2]), call, mask, slots)
            return self.output(attended, post_op, *others)
        query, key, value = self.split_heads(projected, *x.shape[:2])
        if self.rope is not None:
            cos, sin, rotary_dim = self.rotation(query, call)
            query = ops.rotary(query, cos, sin, rotary_dim, self.interleaved)
            key = ops.rotary(key, cos, sin, rotary_dim, self.interleaved)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if slots is not None:
            attended = self.attend_in_place(query, key, value, mask, slots)
        else:
            if call.cache is not None:
                key, value = call.cache.update(key, value, self.layer_index)
            attended = self.attend(query, key, value, call)
        return self.output(attended.flatten(2), post_op, *others)

    def split_heads(self, projected: list[torch.Tensor], *shape: int) -> Heads:
        """Queries, keys and values, with the norms of heads applied."""
        query, key, value = self.split(self, projected, *shape)
        if self.norms and not self.names.joint_norms:
            query, key = self.norms[0](query), self.norms[1](key)
        return query, key, value

    def join(self, projected: list[torch.Tensor], *shape: int) -> torch.Tensor:
        """All queries, then all keys, then all values: ``[B, L, (H + 2 * Hkv) * D]``."""
        if not self.joins:
            return torch.cat(self.split_heads(projected, *shape), dim=2).flatten(2)
        return projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)

    def fits_one_call(self, x: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether one native call may rotate, store and attend; its attention is always causal."""
        few = self.is_joined or x.shape[0] * x.shape[1] <= MAX_JOINED
        return self.is_causal and few and (mask is None or x.shape[1] == 1)

    def reserve(self, x: torch.Tensor, call: LayerCall) -> Slots | None:
        """Slots of a native cache for keys and values of `x`; None if the cache's `update` must be called instead."""
        layers, index, length, mask = call.cache.layers, self.layer_index, x.shape[1], call.mask
        layer = layers[index] if index < len(layers) else None
        if not isinstance(layer, NativeLayer) or (length > 1 and (layer.is_sliding or self.names.position_bias)):
            return None
        reserved = layer.reserve(length) if mask is None or type(mask) is torch.Tensor else None
        if reserved is None or layer.dtype != x.dtype or reserved[0][0].dtype not in (x.dtype, torch.int8):
            return None
        (keys, values, *scales), start = reserved
        return Slots(layer, keys, values, *(scales or (None, None, None)), start)

    def rotation(self, x: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Cosines and sines ``[B or 1, L, R or R / 2]`` for `x` ``[B, L, ...]``, and R, the features that rotate."""
        if self.rope is None:
            empty = x.new_empty(1, x.shape[1], 0)
            return empty, empty, 0
        cos, sin = self.rope(call, self.module, x.dtype)
        return cos, sin, cos.shape[-1] * (2 if self.interleaved else 1)

    def rotate_and_attend(
        self, joined: torch.Tensor, call: LayerCall, mask: torch.Tensor | None, slots: Slots
    ) -> torch.Tensor:
        """Rotate, write the cache and attend in one native call: ``[B, L, H * D]``."""
        cos, sin, rotary_dim = self.rotation(joined, call)
        attended = ops.fused_rope_attention(
            joined,
            cos,
            sin,
            slots.keys,
            slots.values,
            slots.key_scales,
            slots.value_scales,
            start=slots.start,
            scale=self.scale,
            rotary_dim=rotary_dim,
            interleaved=self.interleaved,
            mask=mask,
            softcap=self.softcap,
            alibi=self.slopes,
            key_factors=slots.key_factors,
        )
        slots.layer.commit(joined.shape[1])
        return attended

    def attend_in_place(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, slots: Slots
    ) -> torch.Tensor:
        """Write keys and values to the reserved slots of a native cache and attend to it: ``[B, L, H, D]``."""
        layer, keys, values, key_scales, value_scales, key_factors, start = slots
        ops.write_cache(key, keys, key_scales, start, key_factors)
        ops.write_cache(value, values, value_scales, start)
        layer.commit(key.shape[2])
        stored = slice(None), slice(None), slice(start + key.shape[2])
        return ops.attention(
            query,
            keys[stored],
            values[stored],
            scale=self.scale,
            causal=mask is None and self.is_causal,
            mask=mask,
            softcap=self.softcap,
            alibi=self.slopes,
            key_scales=None if key_scales is None else key_scales[stored],
            value_scales=None if value_scales is None else value_scales[stored],
            key_factors=key_factors,
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Attention ``[B, L, H, D]`` of `query` ``[B, H, L, D]`` over keys and values from any cache."""
        mask = call.mask
        if self.slopes is None:
            options = {"softcap": self.softcap} if self.softcap else {}
            if self.names.position_bias:
                options["position_bias"] = self.position_bias(call, query.shape[2], key.shape[2])
            return attention_forward(self.module, query, key, value, mask, scaling=self.scale, **options)[0]
        options = {"causal": mask is None, "mask": mask}
        return attend(query, Storage.of(key), Storage.of(value), scale=self.scale, alibi=self.slopes, **options)

    def position_bias(self, call: LayerCall, queries: int, keys: int) -> torch.Tensor | None:
        """The bias to add to the scores, computed once by the layer with the table of biases and kept in `call`."""
        if call.position_bias is None and self.module.has_relative_attention_bias:
            call.position_bias = self.module.compute_bias(queries, keys, past_seen_tokens=keys - queries)
        return call.position_bias


def _features(linear: nn.Module) -> tuple[int, int]:
    if is_linear(linear) and not hasattr(linear, "out_features"):  # transformers' Conv1D
        return linear_shape(linear)
    return part(linear, "out_features"), part(linear, "in_features")


class CrossAttention(FusedAttention):
    """Cross-attention of a decoder to an encoder, whose keys and values are computed once."""

    def __init__(self, module: nn.Module, names: Attention) -> None:
        super().__init__(module, names)
        query, *rest = names.projections
        self.query = linear_call(part(module, query))
        self.project = linear_calls([part(module, name) for name in rest])

    def __call__(
        self, x: torch.Tensor, call: LayerCall, post_op: PostOp = PostOp.NONE, *others: torch.Tensor
    ) -> torch.Tensor:
        query, caches = self._heads(self.query(x)), call.caches
        if caches is not None and caches.is_updated.get(self.layer_index):
            layer = caches.cross_attention_cache.layers[self.layer_index]
            key, value = layer.keys, layer.values
        else:
            key, value = map(self._heads, self.project(call.encoder_states))
            if caches is not None:
                key, value = caches.cross_attention_cache.update(key, value, self.layer_index)
                caches.is_updated[self.layer_index] = True
        attended = attention_forward(self.module, query, key, value, call.encoder_mask, scaling=self.scale)[0]
        return self.output(attended.flatten(2), post_op, *others)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


def alibi_slopes(heads: int) -> torch.Tensor:
    """ALiBi slopes of the heads (Press et al., "Train Short, Test Long", 2022): float32 ``[heads]``.

    With a power of two heads, the slopes are the powers of ``2 ** (-8 / heads)``. Otherwise those of the next smaller
    power of two come first, then every second one of the next larger.
    """
    larger = 1 << (heads - 1).bit_length()
    slopes = torch.exp2(torch.arange(1, larger + 1) * (-8 / larger))
    return slopes if larger == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def _separate(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    query, key, value = projected
    size = attention.head_size
    return query.view(*shape, -1, size), key.view(*shape, -1, size), value.view(*shape, -1, size)


def _blocks(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    heads = projected[0].view(*shape, -1, attention.head_size)
    return heads.split((attention.heads, attention.key_heads, attention.key_heads), dim=2)


def _groups(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    heads = projected[0].view(*shape, attention.key_heads, -1, attention.head_size)
    return heads[:, :, :, :-2].flatten(2, 3), heads[:, :, :, -2], heads[:, :, :, -1]


def _quarters(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    heads = projected[0].view(*shape, 4, 3, -1, attention.head_size)
    query, value, key = (part.flatten(2, 3) for part in heads.unbind(3))
    return query, key, value


_SPLITS: dict[Layout, Callable[..., Heads]] = {
    Layout.SEPARATE: _separate,
    Layout.BLOCKS: _blocks,
    Layout.GROUPS: _groups,
    Layout.QUARTERS: _quarters,
}


Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines ``[B or 1, L, R or R / 2]``."""


def _given(call: LayerCall, module: nn.Module, dtype: torch.dtype) -> Tables:
    return call.position_embeddings


def _given_halves(call: LayerCall, module: nn.Module, dtype: torch.dtype) -> Tables:
    cos, sin = call.position_embeddings
    return cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]


def _given_twice(call: LayerCall, module: nn.Module, dtype: torch.dtype) -> Tables:
    cos, sin = call.position_embeddings
    return cos[..., ::2], sin[..., ::2]


def _given_sines(call: LayerCall, module: nn.Module, dtype: torch.dtype) -> Tables:
    sin, cos = call.position_embeddings
    return cos, sin


def _looked_up(call: LayerCall, module: nn.Module, dtype: torch.dtype) -> Tables:
    table = F.embedding(call.position_ids, module.embed_positions)
    sin, cos = table.to(dtype).chunk(2, dim=-1)
    return cos, sin


_ROPES = {
    Rope.NONE: None,
    Rope.HALF: _given,
    Rope.INTERLEAVED: _given_halves,
    Rope.TWICE: _given_twice,
    Rope.SINES: _given_sines,
    Rope.TABLE: _looked_up,
}
