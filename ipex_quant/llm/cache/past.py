"""Keys and values as IPEX's scripts pass them: a tuple (seq_info, key, value, beam_idx) for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ...errors import ArgumentError

Tuples = Sequence[Sequence[torch.Tensor]]
"""For each layer (seq_info, key, value, beam_idx): the second last size of `seq_info` is the number of stored tokens,
`key` and `value` are ``[B, Hkv, T, D]``, or anything where no token is stored, and `beam_idx` is handed through."""


def is_past(value: Any) -> bool:
    """Whether `value` can be keys and values as tuples: a tuple or list that holds tuples or lists."""
    return isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], (tuple, list))


class TupleCache(DynamicCache):
    """The cache of a call whose past came as tuples; `Past` gives it back as such."""

    def __init__(self, beam_indices: Sequence[torch.Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.beam_indices = list(beam_indices)

    def tuples(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """The stored tokens of each layer as (seq_info, key, value, beam_idx), without copies where it can be."""
        return tuple(map(layer_tuple, self.layers, self.beam_indices))


def layer_tuple(layer: CacheLayerMixin, beam_idx: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tuple (seq_info, key, value, beam_idx) of a cache `layer` that stores tokens."""
    length = layer.get_seq_length()
    seq_info = beam_idx.new_zeros(1, 1, 1, 1).expand(1, length, length, 1)
    return seq_info, layer.keys, layer.values, beam_idx


def empty_tuple() -> tuple[torch.Tensor, ...]:
    """The tuple of a layer without tokens, as IPEX's scripts make it."""
    empty = torch.zeros(1, 1, 1, 1)
    return torch.zeros(1, 0, 0, 1, dtype=torch.long), empty, empty, torch.zeros(1, 4, dtype=torch.long)


class Past(tuple):
    """The tuples of a `TupleCache` after a call, and the cache itself.

    A later call with it goes on with the cache. Tokens that calls have added since are forgotten then, as IPEX's
    buffers forget them.
    """

    cache: TupleCache

    @classmethod
    def of(cls, cache: TupleCache) -> Past:
        past = cls(cache.tuples())
        past.cache = cache
        return past

    def resumed(self) -> TupleCache:
        """The cache, with the tokens that were stored when this object was made; ValueError if it holds fewer."""
        stored, wanted = self.cache.get_seq_length(), stored_tokens(self)
        if stored < wanted:
            raise ArgumentError(f"past_key_values: {wanted} tokens were stored, but a call went back to {stored} since")
        if stored > wanted:
            self.cache.crop(wanted - stored)
        return self.cache


class TracedLayer(DynamicLayer):
    """A cache layer over the tensors of one layer's tuple, in operations that `torch.jit.trace` records.

    While tracing, sizes are traced too, so that the graph takes any number of stored and new tokens.
    """

    def __init__(self, seq_info: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._stored = seq_info.shape[-2]
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; return all of them, ``[B, Hkv, T, D]``."""
        self.keys, self.values = self._joined(self.keys, key_states), self._joined(self.values, value_states)
        self._stored = self._stored + key_states.shape[-2]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._stored + query_length, 0

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # Without tokens `past` has any shape: of no rows it makes a tensor of the right one.
        rows = past[:, :, : self._stored].reshape(new.shape[0], new.shape[1], self._stored, new.shape[3])
        return torch.cat([rows.to(new.dtype), new], dim=2)


def stored_tokens(past: Tuples) -> int:
    """The number of tokens that the tuples hold."""
    return past[0][0].shape[-2]


def check_tuples(past: Tuples, layers: int) -> None:
    """Raise ValueError unless `past` has a tuple of four tensors for each of a model's `layers`."""
    if len(past) != layers:
        raise ArgumentError(f"past_key_values: expected a tuple for each of {layers} layers, got {len(past)}")
    for number, layer in enumerate(past):
        if len(layer) != 4 or not all(isinstance(tensor, torch.Tensor) for tensor in layer) or layer[0].dim() < 2:
            found = [tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__ for each in layer]
            raise ArgumentError(
                "past_key_values: expected tensors (seq_info [1, T, T, 1], key [B, Hkv, T, D], value, beam_idx) of "
                f"each layer, got {found} of layer {number}; transformers' own form is a Cache"
            )


def traced_cache(past: Tuples) -> TupleCache:
    """A cache of `TracedLayer` over the tuples `past`."""
    cache = TupleCache([layer[3] for layer in past])
    cache.layers = [TracedLayer(*layer[:3]) for layer in past]
    return cache


def fill(layers: Sequence[CacheLayerMixin], past: Tuples) -> None:
    """Store the tokens of the tuples `past` in empty cache `layers`."""
    for layer, (_, keys, values, _) in zip(layers, past, strict=True):
        layer.update(keys, values)
