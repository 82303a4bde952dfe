"""The paged cache of transformers' continuous batching as a `Cache` whose layers write and read blocks natively."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin

from ... import ops
from ...nn.deferred import DeferredTensor

Attend = Callable[..., torch.Tensor]
"""Attention of queries ``[tokens, H, D]``: ``[tokens, H, Dv]``; options are `scale` and `softcap`."""


class PagedTensor(DeferredTensor):
    """The new keys or values of a step, which are in the paged cache: only `attention` reads them."""

    @staticmethod
    def __new__(cls, new: torch.Tensor, dtype: torch.dtype, attend: Attend) -> PagedTensor:
        return DeferredTensor.__new__(cls, new.shape, new.dtype, new.device)

    def __init__(self, new: torch.Tensor, dtype: torch.dtype, attend: Attend):
        self._stored_dtype, self._attend = dtype, attend

    def attention(self, query: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attention of `query` ``[1, H, tokens, D]`` over all tokens of each sequence: ``[1, tokens, H, Dv]``."""
        attended = self._attend(query[0].transpose(0, 1).to(self._stored_dtype), **options)
        return attended.to(query.dtype).unsqueeze(0)

    def _compute(self) -> torch.Tensor:
        raise RuntimeError(
            "continuous batching: the attention of this model reads keys and values itself, which are in blocks; call "
            "model.set_attn_implementation('sdpa') before"
        )


class Step(Protocol):
    """One step of the sequences in a batch, for the layers of one allocator."""

    dtype: torch.dtype

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Attend:
        """Store keys and values ``[tokens, Hkv, D]`` of new tokens; return the attention over all that is stored."""


class BlockStep:
    """Stores new tokens in blocks and attends to the blocks of each sequence.

    `caches` give each layer's keys and values, ``[blocks, Hkv, block size, D]``; `slots`, `tables`, `lengths` and
    `starts` are as `ops.write_paged_cache` and `ops.paged_attention` take them.
    """

    def __init__(
        self,
        caches: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        self.caches, self.slots = caches, slots
        self.tables, self.lengths, self.starts = tables, lengths, starts
        self.dtype = next(iter(caches.values()))[0].dtype

    @cached_property
    def pages(self) -> tuple[torch.Tensor, ...] | None:
        """Tables, lengths and starts if the new tokens go where `ops.paged_rope_attention` writes them, else None."""
        page = next(iter(self.caches.values()))[0].shape[2]
        counts = self.starts.diff()
        sequences = torch.repeat_interleave(torch.arange(len(counts)), counts)
        places = torch.arange(len(sequences)) + (self.lengths - self.starts[1:])[sequences]
        follow = torch.equal(self.tables[sequences, places // page] * page + places % page, self.slots)
        return (self.tables, self.lengths, self.starts) if follow else None

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Attend:
        keys, values = self.caches[layer]
        ops.write_paged_cache(key, value, keys, values, self.slots)

        def attend(query: torch.Tensor, **options: Any) -> torch.Tensor:
            return ops.paged_attention(query, keys, values, self.tables, self.lengths, self.starts, **options)

        return attend


class WindowStep:
    """Stores several new tokens of a sequence in a ring that holds one window.

    They may overwrite tokens that the first of them still see, so that what is stored is read before by `update`, which
    returns keys and values ``[tokens, Hkv, D]`` of all sequences, within `key_starts`.
    """

    def __init__(
        self,
        update: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
        starts: torch.Tensor,
        key_starts: torch.Tensor,
        window: int,
    ) -> None:
        self.update, self.dtype = update, dtype
        self.starts, self.key_starts, self.window = starts, key_starts, window

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Attend:
        keys, values = self.update(key, value, layer)

        def attend(query: torch.Tensor, **options: Any) -> torch.Tensor:
            options |= {"causal": True, "window": self.window}
            return ops.varlen_attention(query, keys, values, self.starts, self.key_starts, **options)

        return attend


class PagedLayer(CacheLayerMixin):
    """The layer number `index` of a `PagedCache`."""

    is_sliding = False

    def __init__(self, step: Step, index: int) -> None:
        super().__init__()
        self.step, self.index = step, index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys ``[1, Hkv, tokens, D]`` and values; return what stands for them in the native attention."""
        dtype = self.step.dtype
        attend = self.step.store(self.index, *(x[0].transpose(0, 1).to(dtype) for x in (key_states, value_states)))
        return PagedTensor(key_states, dtype, attend), PagedTensor(value_states, dtype, attend)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the blocks are there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # those of a plain causal mask, which nothing reads

    def get_seq_length(self) -> int:
        return 0  # each sequence has its own; models get the positions

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """The cache of one step of continuous batching, of which `steps` gives each layer's part."""

    def __init__(self, steps: Mapping[int, Step]) -> None:
        super().__init__(layers=[PagedLayer(steps[index], index) for index in sorted(steps)])

    def common_step(self, layers: Iterable[int]) -> BlockStep | None:
        """The step that all these layers share, if it stores and reads blocks."""
        steps = {id(self.layers[index].step): self.layers[index].step for index in layers}
        step = steps.popitem()[1]
        return step if isinstance(step, BlockStep) and not steps else None


def unknown_release() -> RuntimeError:
    """The error for a release of transformers whose continuous batching is another one."""
    return RuntimeError(
        f"continuous batching: transformers {transformers.__version__} has another paged cache than the one that the "
        "native attention reads (that of 5.23); call model.set_attn_implementation('sdpa') before, or use 5.23"
    )
