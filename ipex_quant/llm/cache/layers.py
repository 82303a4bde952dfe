"""KV caches that are written in place and read by the native attention; beam search changes only an index.

They are layers of transformers' `Cache`, so that every decoding method of `generate` works with them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ...nn.deferred import values_of
from ...numerics.scheme import FLOAT_DTYPES
from ...ops import write_cache
from ...ops.gradient import needs_gradient
from .key_factors import FACTOR_TOKENS, outlier_factors
from .storage import Storage, attend


class NativeLayer(CacheLayerMixin):
    """Keys and values of one attention layer, in buffers that grow geometrically.

    Without beams the buffers are ``[B, Hkv, capacity, D]``. When sequences are repeated or reordered they are
    ``[1, Hkv, slots, D]`` instead, every token in a slot of its own, and an index says which slot holds position t of
    sequence b: beam search then changes the index alone, and a prompt is stored once for all its beams.

    `storage_dtype` is None for the dtype of the given keys and values, a float dtype, or torch.int8 with one scale per
    token and head; ValueError for any other. INT8 keys are divided by `outlier_factors`, and queries multiplied by
    them; the factors may change until `FACTOR_TOKENS` tokens are stored. Without `spare` no extra slots are allocated.
    `indexed` says that sequences will be repeated, so that several prompts have an index from the start.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, storage_dtype: torch.dtype | None = None, spare: bool = True, indexed: bool = False):
        if storage_dtype not in (None, torch.int8, *FLOAT_DTYPES):
            raise ValueError(
                "kv_cache_dtype: expected None, torch.int8, torch.float32, torch.bfloat16 or torch.float16, "
                f"got {storage_dtype}"
            )
        self.storage_dtype = storage_dtype
        self.spare = spare
        self.indexed = indexed
        self.reset()

    # Methods that transformers calls

    def reset(self) -> None:
        """Drop all tokens and free the buffers."""
        self.is_initialized = False
        self._buffers: tuple[torch.Tensor, ...] = ()  # keys, values, and for int8 the scales of both
        self._factors: torch.Tensor | None = None  # divisors of int8 keys' channels, float32 [Hkv, D]
        self._rows: torch.Tensor | None = None  # slot minus position, int32 [B, count]
        self._stride: int | None = None  # slots from one sequence to the next, while they are in order
        self._batch = 0
        self._count = 0  # positions stored
        self._used = 0  # slots written; without an index, a position is a slot
        self._first = 0  # the first position that is needed
        self._had_gradients = False  # stored tokens were part of an autograd graph

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take sizes and dtype from keys ``[B, Hkv, L, D]`` and values."""
        self._batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        flat = self.indexed and self._batch > 1
        self._rows = torch.empty(self._batch, 0, dtype=torch.int32, device=self.device) if flat else None
        dtype = self.storage_dtype or self.dtype
        shapes = [(1 if flat else self._batch, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states)]
        self._buffers = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes)
        if dtype == torch.int8:
            self._buffers += tuple(torch.empty(shape[:3], device=self.device) for shape in shapes)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; return all of them as ``[B, Hkv, T, D]`` tensors: views, or deferred tensors.

        If gradients are needed, the result holds the new tokens with their gradients. Stored tokens have none, so a
        later call with gradients raises RuntimeError.
        """
        if not needs_gradient(key_states, value_states):
            keys, values = self.append(key_states, value_states)
            return keys.tensor(), values.tensor()
        if self._had_gradients:
            raise RuntimeError(
                "gradients do not reach the tokens of earlier calls that a native KV cache stores: call the model with "
                "use_cache=False, with past_key_values=DynamicCache(config=model.config), or under torch.no_grad()"
            )
        stored = self.append(key_states.detach(), value_states.detach())
        self._had_gradients = True
        length = key_states.shape[2]
        new = (key_states, value_states)
        pasts = (values_of(each.tensor())[:, :, :-length] for each in stored)
        return tuple(torch.cat(both, dim=2) for both in zip(pasts, new, strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._count + query_length, 0

    def get_seq_length(self) -> int:
        return self._count

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens. Raises ValueError for a positive number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        self._forget(min(-tokens_to_remove, self._count))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i a copy of the former sequence ``beam_idx[i]``, by index."""
        if not self._count:
            return
        if self._rows is None:
            if torch.equal(beam_idx, torch.arange(self._batch)):
                return
            self._index()
        self._rows = self._rows.index_select(0, beam_idx)
        self._batch, self._stride = len(beam_idx), None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(torch.arange(self._batch)[indices])

    @property
    def keys(self) -> torch.Tensor | None:
        return self.stored()[0].tensor() if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        return self.stored()[1].tensor() if self.is_initialized else None

    # Methods that this package calls

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, scales, factors and index."""
        return sum(x.nbytes for x in (*self._buffers, self._factors, self._rows) if x is not None)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Storage, Storage]:
        """Add keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, Dv]``; return those that the new tokens may attend to.

        Raises ValueError for another number of sequences or heads, another head size or dtype than before, and
        RuntimeError for tensors with gradients; nothing is written then.
        """
        self._check(key, value)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        length = key.shape[2]
        if length:
            if self._needs_factors():
                self._find_factors(key)
            self._ensure_capacity(length)
            self._write(key, value)
            self.commit(length)
        return self.stored(length)

    def stored(self, query_length: int = 0) -> tuple[Storage, Storage]:
        """Keys and values that the last `query_length` tokens may attend to."""
        first = self._visible_from(query_length)
        keys, values, *scales = (self._from(x, first) for x in self._buffers)
        rows = self._rows[:, first:] if self._rows is not None and self._stride is None else None
        key_scales, value_scales = scales or (None, None)
        factors = self._factors
        return Storage(keys, key_scales, rows, self.dtype, factors), Storage(values, value_scales, rows, self.dtype)

    def attention(self, query: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attention of `query`, the last tokens ``[B, H, Lq, D]``, over the stored keys and values: see `attend`."""
        return attend(query, *self.stored(query.shape[2]), **options)

    def reserve(self, length: int) -> tuple[tuple[torch.Tensor, ...], int] | None:
        """Reserve slots for `length` more tokens, which a native call writes and reads; `commit` then counts them.

        Returns (buffers, position to write at). The buffers are keys and values, from the first position that is needed
        to the capacity, and for int8 their scales and the factors of keys. Returns None before the first token, before
        the factors are found, and if there is an index: call `append` then.
        """
        if not self._count or self._rows is not None or self._needs_factors():
            return None
        self._ensure_capacity(length)
        first = self._visible_from(0)
        buffers = tuple(x[:, :, first:] for x in self._buffers) if first else self._buffers
        return buffers if self._factors is None else (*buffers, self._factors), self._count - first

    def commit(self, length: int) -> None:
        """Count `length` tokens that were written where `reserve` said."""
        if self._rows is not None:
            starts = self._starts(length).add_(self._used - self._count)
            self._rows = torch.cat([self._rows, starts.expand(-1, length)], dim=1)
            self._stride = length if not self._count else None
        self._count += length
        self._used += length if self._rows is None else length * self._batch

    # Storage

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "keys and values: expected [B, Hkv, L, D] and [B, Hkv, L, Dv], "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if key.dtype not in FLOAT_DTYPES or value.dtype != key.dtype:
            raise ValueError(
                f"keys and values: expected both float32, bfloat16 or float16, got {key.dtype} and {value.dtype}"
            )
        if needs_gradient(key, value):
            raise RuntimeError(
                "a native KV cache is for inference: call the model under torch.no_grad() or torch.inference_mode()"
            )
        if not self.is_initialized:
            return
        if key.dtype != self.dtype:
            raise ValueError(f"keys and values: expected {self.dtype}, as in what is stored, got {key.dtype}")
        for name, new, old in (("keys", key, self._buffers[0]), ("values", value, self._buffers[1])):
            expected = (self._batch, old.shape[1], old.shape[3])
            if (new.shape[0], new.shape[1], new.shape[3]) != expected:
                raise ValueError(
                    f"{name}: expected [{expected[0]}, {expected[1]}, L, {expected[2]}], as what is stored, "
                    f"got {tuple(new.shape)}"
                )

    def _visible_from(self, query_length: int) -> int:
        return 0

    def _starts(self, length: int) -> torch.Tensor:
        """First slots of consecutive sequences of `length` tokens, int32 ``[B, 1]``."""
        return torch.arange(self._batch, dtype=torch.int32, device=self.device).mul_(length).unsqueeze_(1)

    def _from(self, buffer: torch.Tensor, first: int) -> torch.Tensor:
        """The rows of `buffer`, from position `first` on."""
        if self._rows is None:
            return buffer[:, :, first : self._count]
        # With an index, row r is the buffer from slot r on, so that rows overlap.
        rows, step = (self._used - self._count + 1, 1) if self._stride is None else (self._batch, self._stride)
        slot = buffer.stride(2)
        return buffer.as_strided(
            (rows, buffer.shape[1], self._count - first, *buffer.shape[3:]),
            (step * slot, *buffer.stride()[1:]),
            first * slot,
        )

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        buffers, length = self._buffers, key.shape[2]
        if self._rows is not None:  # each sequence goes `length` slots after the one before
            capacity = self._capacity - (self._batch - 1) * length
            buffers = tuple(
                x.as_strided((self._batch, x.shape[1], capacity, *x.shape[3:]), (length * x.stride(2), *x.stride()[1:]))
                for x in buffers
            )
        scales = buffers[2:] or (None, None)
        for new, buffer, scale, factors in zip((key, value), buffers[:2], scales, (self._factors, None), strict=True):
            write_cache(new.to(buffer.dtype) if scale is None else new, buffer, scale, self._used, factors)

    def _needs_factors(self) -> bool:
        return self._buffers[0].dtype == torch.int8 and self.get_seq_length() < FACTOR_TOKENS

    def _find_factors(self, key: torch.Tensor) -> None:
        """Find the factors from the stored keys and `key`, and quantize the stored keys again."""
        if not key.numel():
            self._factors = torch.ones(key.shape[1], key.shape[3], device=self.device)
        elif not self._count:
            self._factors = outlier_factors(key)
        else:
            codes, scales = (self._buffers[i][:, :, : self._used] for i in (0, 2))
            stored = codes.float() * scales.unsqueeze(-1) * self._factors[:, None]
            self._factors = outlier_factors(stored, key)
            self._grow(self._capacity)  # to new memory: tensors returned before still have the old factors
            write_cache(stored, self._buffers[0], self._buffers[2], 0, self._factors)

    @property
    def _capacity(self) -> int:
        return self._buffers[0].shape[2]

    def _ensure_capacity(self, length: int) -> None:
        slots = length if self._rows is None else self._batch * length
        if self._used + slots > self._capacity and self._first:
            self._drop()
        if self._used + slots > self._capacity:
            self._grow(self._grown(self._used + slots))

    def _grown(self, slots: int) -> int:
        return _multiple_of_64(max(slots * 3 // 2, slots + 64)) if self.spare else slots

    def _grow(self, capacity: int) -> None:
        def grown(old: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(False):  # inference tensors cannot be written to outside of it
                new = torch.empty((*old.shape[:2], capacity, *old.shape[3:]), dtype=old.dtype, device=old.device)
            new[:, :, : self._used] = old[:, :, : self._used]
            return new

        self._buffers = tuple(grown(x) for x in self._buffers)

    def _drop(self) -> None:
        """Drop the positions before the first that is needed."""
        first, kept = self._first, self._count - self._first
        if self._rows is None:
            for buffer in self._buffers:
                buffer[:, :, :kept] = buffer[:, :, first : self._count].clone()
            self._used = kept
        else:
            positions = torch.arange(first, self._count, dtype=torch.int32, device=self.device)
            slots = (self._rows[:, first:] + positions).flatten()
            # beams that shared a token get a copy each
            self._buffers = tuple(x.index_select(2, slots) for x in self._buffers)
            self._rows = self._starts(kept).repeat(1, kept)
            self._used, self._stride = len(slots), kept
        self._count, self._first = kept, 0

    def _forget(self, length: int) -> None:
        self._count -= length
        if self._rows is None:
            self._used -= length
        else:
            self._rows = self._rows[:, : self._count]
            self._used = self._used if self._count else 0

    def _index(self) -> None:
        """Change to buffers with an index, a slot for every token; a single sequence is not moved."""
        if self._batch > 1:
            self._buffers = tuple(
                x[:, :, : self._count].transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in self._buffers
            )
            self._used = self._batch * self._count
        self._rows = self._starts(self._count).repeat(1, self._count)


class SlidingLayer(NativeLayer):
    """A `NativeLayer` for attention within the last `window` tokens; it stores at most about twice as many.

    Once `record_past` is set, it stores all tokens until `crop` removes rejected ones, as assisted decoding needs it.
    """

    is_sliding = True

    def __init__(self, window: int, storage_dtype: torch.dtype | None = None, indexed: bool = False):
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self.sliding_window = window
        self.record_past = False
        super().__init__(storage_dtype, indexed=indexed)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        super().reset()
        self._dropped = 0

    def get_seq_length(self) -> int:
        return self._dropped + self._count

    def get_max_length(self) -> int:
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.get_seq_length(), self.sliding_window - 1)
        return past + query_length, self.get_seq_length() - past

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Storage, Storage]:
        kept = self.sliding_window - 1
        if self.record_past or key.shape[2] < max(kept, 1):
            return super().append(key, value)
        # No stored token will be needed again.
        self._check(key, value)
        length = self.get_seq_length() + key.shape[2]
        tail = key[:, :, key.shape[2] - kept :], value[:, :, key.shape[2] - kept :]
        if self._count:
            old = (storage.tensor() for storage in self.stored())
            key, value = (torch.cat(pair, dim=2) for pair in zip(old, (key, value), strict=True))
        self.reset()
        super().append(*tail)
        self._dropped = length - kept
        return Storage(key, None, None, key.dtype), Storage(value, None, None, key.dtype)

    def reserve(self, length: int) -> tuple[tuple[torch.Tensor, ...], int] | None:
        return super().reserve(length) if self.record_past or length < self.sliding_window - 1 else None

    def commit(self, length: int) -> None:
        super().commit(length)
        if not self.record_past:
            self._first = self._visible_from(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises ValueError for a positive number, and RuntimeError where `record_past` is not set and tokens have left
        the window.
        """
        if not self.record_past and self.get_seq_length() >= self.sliding_window:
            raise RuntimeError(
                "crop: tokens have left the window; call activate_past_recording() before they are added"
            )
        super().crop(tokens_to_remove)
        self._first = self._visible_from(0)

    def _visible_from(self, query_length: int) -> int:
        return max(0, self._count - query_length - self.sliding_window + 1)

    def _grown(self, slots: int) -> int:
        sequences = 1 if self._rows is None else self._batch
        return max(slots, min(super()._grown(slots), sequences * _multiple_of_64(2 * self.sliding_window)))

    def _drop(self) -> None:
        self._dropped += self._first
        super()._drop()


def _multiple_of_64(count: int) -> int:
    return -(-count // 64) * 64
