"""Continuous batching by transformers, over the native paged attention.

transformers' scheduler, cache of blocks and server stay as they are. Its attention gathers the keys and values of all
sequences in every layer, and masks those of other sequences; here each sequence is read from its blocks where they are.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.utils import (
    find_head_dim,
    find_num_key_value_heads,
    get_device_and_memory_breakdown,
)

from .cache.naming import CACHE
from .cache.paged import BlockStep, PagedCache, Step, WindowStep, unknown_release

_BASES: tuple[type[Exception], ...] = (ValueError,)
try:  # transformers' server answers these with their status and text, and all others with 500 and nothing
    from starlette.exceptions import HTTPException

    _BASES = (HTTPException, ValueError)
except ImportError:
    pass

MAX_BATCH_TOKENS = 512
"""Tokens of a step where none are given: more make a CPU no faster, and hold up the sequences that decode."""

MAX_CACHE_BYTES = 4 << 30
"""Bytes of the cache, and of what transformers counts besides, where no size is given."""

SAFETY_MARGIN = 0.15
"""The free part of the cache from which transformers' scheduler lets no further requests in."""

_OF_THE_MODEL = {"input_ids", "attention_mask", "position_ids", "use_cache"}
"""The arguments of a step that any call of a model may have; the others are about the cache."""

_READ = {"cache", "block_table", "cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index", "position_ids"}
"""The arguments of a step that are read here."""


class RefusedRequestError(*_BASES):
    """A ValueError for a request that can never be served; transformers' server answers it with status 400."""

    def __init__(self, reason: str) -> None:
        Exception.__init__(self, reason)
        self.status_code, self.detail, self.headers = 400, reason, None

    def __str__(self) -> str:
        return self.detail


class PagedManager(ContinuousBatchingManager):
    """transformers' manager, for a model with the native attention.

    Requests that could never be served are refused alone; transformers would stop, and fail all others with them.
    """

    capacity: int
    """The most tokens that one request may have."""

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = True) -> None:
        """Keep the native attention, which `paged_arguments` gives its blocks."""

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        **options: Any,
    ) -> str | None:
        """Queue a request as transformers does.

        Raises RefusedRequestError for one without tokens, with tokens that the model does not have, or with more, those
        to generate among them, than the cache holds.
        """
        reason = self._reason_against(input_ids, max_new_tokens)
        if reason is not None:
            self.output_router.result_handlers.pop(request_id, None)  # the server's, which would wait for it
            raise RefusedRequestError(reason)
        return super().add_request(input_ids, request_id, max_new_tokens, *args, **options)

    def add_requests(
        self, inputs: list[list[int]], max_new_tokens: int | None = None, *args: Any, **options: Any
    ) -> list[str]:
        """Queue requests; one that `add_request` would refuse gets a result with the error."""
        reasons = [self._reason_against(each, max_new_tokens) for each in inputs]
        good = [each for each, reason in zip(inputs, reasons, strict=True) if reason is None]
        names = iter(super().add_requests(good, max_new_tokens, *args, **options))
        return [
            next(names) if reason is None else self._fail(each, reason)
            for each, reason in zip(inputs, reasons, strict=True)
        ]

    def _fail(self, input_ids: list[int], reason: str) -> str:
        """Deliver the `reason` as the result of a new request, and of each further sequence of it."""
        with self._request_lock:
            name = f"req_{self._request_counter}"
            self._request_counter += 1
        for each in (*(f"{name}__child#{i}" for i in range(self.num_return_sequences - 1)), name):
            self.output_router.fail_and_deliver(RequestState(each, list(input_ids)), RefusedRequestError(reason))
        return name

    def _reason_against(self, input_ids: list[int], limit: int | None) -> str | None:
        """Why a request cannot be served; None if it can. A `limit` of None is that of the generation configuration."""
        limit = self.generation_config.max_new_tokens if limit is None else limit
        if not len(input_ids):
            return "the prompt is empty: expected at least one token"
        size = self.model.config.get_text_config(decoder=True).vocab_size
        unknown = next((token for token in input_ids if not 0 <= token < size), None)
        if unknown is not None:
            return f"the prompt has the token {unknown}: expected numbers from 0 to {size - 1}"
        tokens = len(input_ids) + (1 if limit is None else limit)
        if tokens > self.capacity:
            return (
                f"the prompt of {len(input_ids)} tokens and {tokens - len(input_ids)} new ones need more than the "
                f"{self.capacity} tokens of the cache: shorten them, or raise num_blocks"
            )
        return None


def start_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> ContinuousBatchingManager:
    """`init_continuous_batching` of the class of `model`, which has the native attention, with a `PagedManager`.

    The cache is allocated at once. Steps have `MAX_BATCH_TOKENS` tokens and the cache what the requests of
    `workload_hints` need, at most `MAX_CACHE_BYTES`, unless the configuration says otherwise. Raises RuntimeError for a
    release of transformers whose cache is another one.
    """
    if isinstance(getattr(model, "_cached_continuous_batching_manager", None), ContinuousBatchingManager):
        return type(model).init_continuous_batching(model)
    generation_config = generation_config or model.generation_config
    if generation_config.eos_token_id is None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.eos_token_id = -1  # none, for transformers
    old = getattr(generation_config, "continuous_batching_config", None)  # where it once was
    _check_release()
    chosen = _sized(continuous_batching_config or old or ContinuousBatchingConfig(), model, workload_hints)
    with torch.inference_mode(False), torch.no_grad():  # a thread outside of inference mode writes to the cache
        manager = PagedManager(model, generation_config, chosen, workload_hints)
        manager.warmup()
        cache = manager.batch_processor.cache
        _check_cache(cache)
        manager.capacity = _capacity(cache)
    return manager


def _sized(config: ContinuousBatchingConfig, model: PreTrainedModel, hints: Any) -> ContinuousBatchingConfig:
    """A copy of `config` with sizes where it has none; transformers would take, and write to, 60 % of the memory."""
    config = copy.copy(config)
    if config.max_batch_tokens is None:
        config.max_batch_tokens = MAX_BATCH_TOKENS
    if config.num_blocks is not None or config.max_memory_percent is not None:
        return config
    text = model.config.get_text_config()
    sizes = find_num_key_value_heads(text), find_head_dim(text), model.dtype, config.page_size
    block_bytes = text.num_hidden_layers * FullAttentionCacheAllocator.get_bytes_per_page(*sizes)
    if hints is not None and hints.max_generated_length:
        longest = hints.max_prompt_length + hints.max_generated_length
        blocks = ceil(hints.num_requests * ceil(longest / config.page_size) / (1 - SAFETY_MARGIN)) + 1
        if blocks * block_bytes <= MAX_CACHE_BYTES // 2:
            config.num_blocks = blocks
            return config
    _, total, reserved, allocated = get_device_and_memory_breakdown()
    if total > max(reserved, allocated):
        config.max_memory_percent = min(0.6, MAX_CACHE_BYTES / (total - max(reserved, allocated)))
    return config


def paged_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The `arguments` of a model's call in continuous batching with a `PagedCache`, and without what it replaces.

    Raises RuntimeError for block tables, which transformers makes for kernels of other devices.
    """
    if arguments["block_table"] is not None:
        raise RuntimeError("continuous batching: expected no block tables on a CPU; set max_blocks_per_request to 0")
    cache = arguments["cache"]
    steps = {id(allocator): _step(allocator, arguments) for allocator in cache.cache_allocators.values()}
    layers = {index: steps[id(allocator)] for index, allocator in cache.layer_to_allocator.items()}
    kept = {
        name: value
        for name, value in arguments.items()
        if name in _OF_THE_MODEL or name not in PagedAttentionArgs.__annotations__
    }
    return kept | {CACHE: PagedCache(layers)}


def _step(allocator: CacheAllocator, arguments: Mapping[str, Any]) -> Step:
    """What the layers of `allocator` store and read in a step with these `arguments` of the model.

    `read_index` has the slots of all tokens of each sequence, new ones too; it is empty if no sequence had any before.
    """
    starts, ends = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"][allocator.layer_type]
    reads, writes = arguments["read_index"][allocator.index], arguments["write_index"][allocator.index]
    positions, firsts, lengths = arguments["position_ids"][0], ends[:-1, None], ends.diff()
    page = allocator.tokens_per_page
    slots = reads if reads.numel() else writes
    heads = torch.arange(0, max(int(lengths.max()), 1), page, dtype=torch.int32)  # first tokens of blocks
    places = heads.minimum(lengths[:, None] - 1)
    if isinstance(allocator, SlidingAttentionCacheAllocator):
        window = allocator.sliding_window
        if len(positions) != len(lengths):
            update = partial(allocator.update, read_index=reads, write_index=writes)
            return WindowStep(update, allocator.cache_dtype, starts, ends, window)
        # The ring's own order is that of the blocks; what is read begins with the oldest token, the new one is last.
        slots = slots.index_copy(0, ends[1:].long() - 1, writes)
        full = (positions >= window)[:, None]
        places = torch.where(full, (places - positions[:, None] - 1) % window, places)
    tables = slots[(firsts + places).long()].div(page, rounding_mode="floor").int()
    caches = {index: _blocks(allocator, index) for index in allocator.layer_indices}
    return BlockStep(caches, writes, tables, lengths, starts)


def _blocks(allocator: CacheAllocator, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[blocks, Hkv, block size, D]``, in which a slot is block times size plus place."""
    # The base class has it for all layers; those of windows refuse, since the kernels of other devices need an order.
    keys, values = FullAttentionCacheAllocator.get_cache_for_block_table(allocator, layer)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _capacity(cache: PagedAttentionCache) -> int:
    """The most tokens that one request may have in an empty `cache`."""
    if cache.read_cache_limit is not None:  # every layer has a window
        return sys.maxsize
    return infer_max_single_request_tokens(cache)


def _check_release() -> None:
    """RuntimeError unless transformers has the arguments and methods that are used here."""
    made = inspect.signature(ContinuousBatchingManager).parameters
    expected = {"model", "generation_config", "continuous_batching_config", "workload_hints"}
    fields = PagedAttentionArgs.__annotations__.keys()
    methods = {"switch_to_cb_friendly_attn", "warmup", "add_request"} <= set(dir(ContinuousBatchingManager))
    if not expected <= made.keys() or not fields >= _READ | _OF_THE_MODEL or not methods:
        raise unknown_release()


def _check_cache(cache: PagedAttentionCache) -> None:
    """RuntimeError unless the slots of an empty `cache` are where `_blocks` has them; writes where nothing is read."""
    for allocator in cache.cache_allocators.values():
        sizes = allocator.num_key_value_heads, allocator.tokens_per_page, allocator.head_dim
        token = torch.arange(1, sizes[0] * sizes[2] + 1).remainder(251).view(1, sizes[0], sizes[2])
        slot = allocator.write_trash_index + sizes[1] - 1
        for layer in allocator.layer_indices:
            written = (token + layer).remainder(251).to(allocator.cache_dtype), token.to(allocator.cache_dtype)
            nothing, index = torch.empty(0, dtype=torch.int64), torch.tensor([slot])
            allocator.update(*written, layer, nothing, index)
            for blocks, expected in zip(_blocks(allocator, layer), written, strict=True):
                if tuple(blocks.shape[1:]) != sizes:
                    raise unknown_release()
                if not torch.equal(blocks[slot // sizes[1], :, slot % sizes[1]], expected[0]):
                    raise unknown_release()
