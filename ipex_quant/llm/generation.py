"""Let a transformers model's `generate` and `forward` use the native caches."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from .attention import NAME, is_attention, is_native
from .cache.layers import NativeLayer, SlidingLayer
from .cache.naming import CACHE, CACHE_NAMES, cache_name, given_cache, with_cache_name
from .cache.paged import unknown_release
from .search import hf_beam_sample, hf_beam_search, hf_greedy_search, hf_sample

__all__ = [
    "CacheHook",
    "TokenClock",
    "config_cache_dtype",
    "hf_beam_sample",
    "hf_beam_search",
    "hf_greedy_search",
    "hf_sample",
    "takes_caches",
    "use_native_cache",
]


def use_native_cache(model: PreTrainedModel, kv_cache_dtype: torch.dtype | None = None) -> list[str]:
    """Let `generate` and `forward` of `model` use native KV caches where transformers would make a `DynamicCache`.

    - `kv_cache_dtype` is the dtype of the stored keys and values: torch.int8, a float dtype, or None for
      ``model.config.kv_cache_dtype`` (a dtype or its name), or else the model's dtype.
    - In `generate`, the beams or returned sequences of a prompt share its prefill and its keys and values.
    - `generate_batch`, and whatever else calls `init_continuous_batching`, reads the blocks of transformers' paged
      cache natively; it has the model's dtype.
    - With ``model.config.token_latency = True``, `generate` returns (output, seconds per token), as IPEX does.
    - A model whose own code knows no such caches keeps its own tuples of tensors, and `generate` makes none for it.
    - Calls with gradients or under autocast, caches that already hold tokens, and cache layers of another kind (linear
      attention, convolutions) keep transformers' caches.

    Returns the names of the attention modules that do not use the native attention: they compute with a float copy of
    the whole cache at every step if it is int8 or shared between beams. Raises TypeError if `model` is no transformers
    model and ValueError for an unsupported dtype.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    NativeLayer(kv_cache_dtype)  # checks it
    takes = takes_caches(model)
    if kv_cache_dtype is not None and cache_name(model.forward) is None:
        warnings.warn(f"kv_cache_dtype: a {type(model).__name__} has no cache of keys and values", stacklevel=2)
    elif kv_cache_dtype is not None and not takes:
        warnings.warn(f"kv_cache_dtype: the code of {type(model).__name__} keeps caches of its own", stacklevel=2)
    if not takes:
        model._supports_default_dynamic_cache = _no
    hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CacheHook)]
    if hooks:
        hooks[0].dtype = kv_cache_dtype
    else:
        model.register_forward_pre_hook(CacheHook(model, kv_cache_dtype), with_kwargs=True)
        if model.can_generate():
            # partials, which can be copied and pickled with the model
            model.generate = functools.partial(_generate, model)
            model._prefill = functools.partial(_prefill, model)
            model.generate_batch = functools.partial(_generate_batch, model)
            model.init_continuous_batching = functools.partial(_init_continuous_batching, model)
    return [name for name, module in model.named_modules() if is_attention(module) and not is_native(module)]


_CACHE_NAMES = {"DynamicCache", "get_seq_length", "get_usable_length", "get_mask_sizes", "create_causal_mask"}


def takes_caches(model: nn.Module) -> bool:
    """Whether the code of `model` or of a module in it uses transformers' caches, as the names in it tell.

    Models of before these caches (ChatGLM, Baichuan, QWen 1, Yuan) take and return tensors in tuples.
    """
    if type(model).__module__.startswith("transformers."):
        return True
    return any(map(_uses_caches, {cls for module in model.modules() for cls in type(module).__mro__}))


def _uses_caches(cls: type) -> bool:
    functions = [inspect.unwrap(value) for value in vars(cls).values() if inspect.isfunction(value)]
    names = {name for function in functions for name in (*function.__code__.co_names, *function.__code__.co_varnames)}
    if cls.__module__.startswith("transformers."):
        return cls.__module__.startswith("transformers.models.") and bool(names & {*CACHE_NAMES, "cache_params"})
    return bool(names & _CACHE_NAMES) or {"update", "layer_idx"} <= names


def _no() -> bool:
    return False


def _generate_batch(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate_batch` of the model's class, outside inference mode: a thread without it writes to the paged cache."""
    with torch.inference_mode(False), torch.no_grad():
        return type(model).generate_batch(model, *args, **kwargs)


def _init_continuous_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`init_continuous_batching` of the model's class, over the native attention if the model has it."""
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        return type(model).init_continuous_batching(model, *args, **kwargs)
    hook = next(hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CacheHook))
    dtype = hook.dtype or config_cache_dtype(model)
    if dtype not in (None, model.dtype):
        warnings.warn(
            "kv_cache_dtype: continuous batching keeps keys and values in the model's dtype, not in "
            f"{str(dtype).removeprefix('torch.')}",
            stacklevel=2,
        )
    try:  # only here, since its release of transformers may have none, or another one
        from .continuous import start_batching
    except ImportError as error:
        raise unknown_release() from error
    return start_batching(model, *args, **kwargs)


class CacheHook:
    """A forward pre-hook that replaces the empty cache layers of a model by native ones."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None):
        self.dtype = dtype
        names = list(inspect.signature(model.forward).parameters)
        makes_caches = model.can_generate() and model._supports_default_dynamic_cache()
        self._name = cache_name(model.forward)
        self._position = names.index(self._name) if makes_caches and self._name is not None else -1

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "read_index" in kwargs:  # a step of continuous batching, whose cache is no model's
            if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
                return args, kwargs
            from .continuous import paged_arguments

            return args, paged_arguments(kwargs)
        kwargs = with_cache_name(kwargs, self._name)  # `generate` has one name for the code of all models
        if torch.is_grad_enabled() and any(_differentiable(model, args, kwargs)):
            return args, kwargs
        cache = given_cache(kwargs)
        makes_cache = cache is None and len(args) <= self._position and _uses_cache(model, kwargs)
        if makes_cache and not _is_packed(kwargs):
            cache = _dynamic_cache(model)
            kwargs = {**kwargs, self._name: cache}
        self.make_native(cache, model)
        return args, kwargs

    def make_native(self, cache: Any, model: PreTrainedModel, shared: bool = False) -> None:
        """Replace the empty layers of `cache` by native ones; `shared` says that sequences will be repeated."""
        if torch.is_autocast_enabled("cpu"):  # keys and values may then differ in dtype
            return
        dtype = self.dtype or config_cache_dtype(model)
        if isinstance(cache, EncoderDecoderCache):
            _replace_layers(cache.self_attention_cache, dtype, shared)
            _replace_layers(cache.cross_attention_cache, dtype, shared, spare=False)
        elif isinstance(cache, DynamicCache):
            _replace_layers(cache, dtype, shared)
        if dtype is None or not isinstance(cache, (DynamicCache, StaticCache)):
            return
        kept = cache.offloading or isinstance(cache, StaticCache)
        if kept and dtype != model.dtype and not _holds_something(cache):
            kind = "an offloaded" if cache.offloading else "a static"
            warnings.warn(
                f"kv_cache_dtype: {kind} cache keeps keys and values in the model's dtype, not in "
                f"{str(dtype).removeprefix('torch.')}; leave out cache_implementation and the cache, or set "
                "kv_cache_dtype to None",
                stacklevel=2,
            )


def _differentiable(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Iterator[bool]:
    """Whether each tensor among the arguments, and each parameter, needs a gradient."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return (tensor.requires_grad for tensor in chain(tensors, model.parameters()))


@torch.compiler.disable
def _holds_something(cache: Cache) -> bool:
    return any(layer.is_initialized for layer in cache.layers)


def config_cache_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """``model.config.kv_cache_dtype``, or the dtype of that name; `NativeLayer` refuses any other value."""
    dtype = getattr(model.config, "kv_cache_dtype", None)
    return getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype


def _replace_layers(cache: Cache, dtype: torch.dtype | None, shared: bool, spare: bool = True) -> None:
    if cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(NativeLayer, dtype, spare, shared)
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "is_initialized", False):
            continue
        # Not subclasses: they have other state too.
        if type(layer) is DynamicLayer:
            cache.layers[i] = NativeLayer(dtype, spare, shared)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = SlidingLayer(layer.sliding_window, dtype, shared)
            cache.layers[i].record_past = layer.record_past
        elif isinstance(layer, NativeLayer):
            layer.indexed |= shared


def _uses_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return getattr(model.config.get_text_config(decoder=True), "use_cache", False) if use_cache is None else use_cache


def _is_packed(kwargs: dict[str, Any]) -> bool:
    """Whether rows hold several sequences each: without mask and cache, models tell them apart by `position_ids`."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or kwargs.get("attention_mask") is not None:
        return False
    return not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) != 1).any())


def _dynamic_cache(model: PreTrainedModel) -> Cache:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache())  # cross-attention has no window
    return DynamicCache(config=config)


# --- one prefill per prompt ---


def _prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> ModelOutput:
    """`GenerationMixin._prefill`, run once for each prompt, although the inputs repeat it for each beam or sequence."""
    prefill = functools.partial(type(model)._prefill, model)
    copies = max(generation_config.num_beams, generation_config.num_return_sequences)
    cache = given_cache(model_kwargs)
    if copies == 1 or not isinstance(cache, Cache) or model_kwargs.get("mm_encoder_outputs") is not None:
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
    hook = next(hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CacheHook))
    hook.make_native(cache, model, shared=True)
    if not all(isinstance(layer, NativeLayer) for layer in _layers(cache)) or cache.get_seq_length():
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
    prompts = {name: _every(value, copies, name) for name, value in model_kwargs.items()}
    outputs = prefill(input_ids[::copies], generation_config, prompts, *args, **kwargs)
    # It may be a new cache: Phi-3 drops the old one when it changes to its long factors.
    made = getattr(outputs, CACHE, None)
    (cache if made is None else made).batch_repeat_interleave(copies)
    return type(outputs)(**{name: _repeated(value, copies) for name, value in outputs.items()})


def _layers(cache: Cache) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    return cache.layers


def _every(value: Any, copies: int, name: str = "") -> Any:
    """Every `copies`-th row of the tensors in `value`, which `generate` has repeated for each beam or sequence."""
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _every(item, copies) for key, item in value.items()})
    if isinstance(value, torch.Tensor) and value.dim():
        return value[:, ::copies] if name == "position_ids" and value.dim() == 3 else value[::copies]
    return value


def _repeated(value: Any, copies: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value.repeat_interleave(copies, dim=0)
    if isinstance(value, (tuple, list)):
        return type(value)(_repeated(item, copies) for item in value)
    return value


# --- seconds per token ---


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's class; with ``config.token_latency`` it returns (output, seconds per token)."""
    generate = functools.partial(type(model).generate, model)
    if not getattr(model.config, "token_latency", False):
        return generate(*args, **kwargs)
    clock = TokenClock()
    criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), clock])
    return generate(*args, stopping_criteria=criteria, **kwargs), clock.seconds


class TokenClock(StoppingCriteria):
    """A criterion that never stops and records the seconds per token; the first token counts from construction."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()
        self._length: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        now = time.perf_counter()
        # Assisted decoding adds several tokens at once.
        tokens = 1 if self._length is None else input_ids.shape[1] - self._length
        self.seconds += [(now - self._last) / tokens] * tokens
        self._last, self._length = now, input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
