"""IPEX's calling convention: keys and values as tuples, and arguments by position in IPEX's order.

``model(input_ids, attention_mask, past_key_values, position_ids)``, with the tuples of `cache.past` in any place after
the first, is what scripts for IPEX call, calibrate with and trace. Calls without such tuples are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import ArgumentTypeError
from .cache.naming import CACHE, cache_name, given_cache, with_cache_name
from .cache.past import Past, TupleCache, check_tuples, fill, is_past, stored_tokens, traced_cache
from .generation import CacheHook, takes_caches

ORDER = ("attention_mask", "position_ids")
"""The tensors that follow the first argument, in the order that all of IPEX's conventions keep around the past."""


def accept_tuples(model: nn.Module) -> None:
    """Let a decoder-only transformers `model` be called by IPEX's convention, besides transformers' own.

    A call with tuples as past gets tuples back: a `Past`, or plain tuples in a tuple while `torch.jit.trace` records.
    With ``config.torchscript`` outputs are a tuple, as they were in transformers 4. Such a call raises
    ValueError for tuples that do not fit the model, and TypeError for further arguments by position.
    """
    if not takes_tuples(model) or _read_tuples in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(_read_tuples, prepend=True, with_kwargs=True)
    model.register_forward_hook(_give_tuples, with_kwargs=True)


def takes_tuples(model: nn.Module) -> bool:
    """Whether `model` is one that `accept_tuples` changes: a decoder-only transformers model that generates.

    Its code must use transformers' caches; models whose own code takes tuples keep those.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        return False
    return cache_name(model.forward) is not None and takes_caches(model)


def _read_tuples(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a call by IPEX's convention as transformers takes them; None for any other call."""
    past = next((value for value in (given_cache(kwargs), *args) if is_past(value)), None)
    if past is None:
        return None
    kwargs = {**by_name(args), **with_cache_name(kwargs, CACHE), CACHE: _cache(model, past)}
    if torch.jit.is_tracing() or getattr(model.config, "torchscript", False):
        kwargs.setdefault("return_dict", False)
    return (), kwargs


def by_name(args: tuple) -> dict[str, Any]:
    """The positional arguments `args` of IPEX's convention, without the past, by transformers' names."""
    if not args:
        return {}
    first, *others = args
    tensors = [other for other in others if not is_past(other)]
    if not isinstance(first, torch.Tensor) or not all(isinstance(other, torch.Tensor) for other in tensors):
        raise ArgumentTypeError(
            "with past_key_values as tuples: expected tensors (input_ids, attention_mask, position_ids) around them, "
            f"got {[type(each).__name__ for each in args]}"
        )
    if len(tensors) > len(ORDER):
        raise ArgumentTypeError(
            f"with past_key_values as tuples: expected at most input_ids, {', '.join(ORDER)} by position, got "
            f"{len(tensors) + 1} tensors; pass the others by name"
        )
    name = "inputs_embeds" if first.is_floating_point() else "input_ids"
    return {name: first, **dict(zip(ORDER, tensors, strict=False))}


def _cache(model: PreTrainedModel, past: Any) -> TupleCache:
    if isinstance(past, Past):
        return past.resumed()
    config = model.config.get_text_config(decoder=True)
    check_tuples(past, config.num_hidden_layers)
    if torch.jit.is_tracing():
        return traced_cache(past)
    cache = TupleCache([layer[3] for layer in past], config=config)
    if stored_tokens(past):
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, CacheHook):
                hook.make_native(cache, model)
        fill(cache.layers, past)
    return cache


def _give_tuples(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """The `output` of a call that `_read_tuples` changed, with the cache as tuples; None for any other call."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, TupleCache):
        return None
    past = cache.tuples() if torch.jit.is_tracing() else Past.of(cache)
    if isinstance(output, tuple):
        return tuple(past if isinstance(each, Cache) else each for each in output)
    output[CACHE] = past
    return output
