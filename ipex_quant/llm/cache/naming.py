"""What transformers calls the cache: `cache` from release 5.24 on, before it and in the code of others other names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

_OLD, _NEW = "past_key_values", "cache"

CACHE = _NEW if any(field.name == _NEW for field in fields(CausalLMOutputWithPast)) else _OLD
"""Name of the cache among the arguments and the outputs of transformers' own models."""

CACHE_NAMES = (_NEW, _OLD)
"""Names by which a model may be given a cache; a release of transformers that has the first takes the second, too."""


def cache_name(forward: Callable[..., Any]) -> str | None:
    """The name by which `forward` takes a cache, or None if it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword `arguments` of a call, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def with_cache_name(arguments: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The keyword `arguments` of a call with the cache under `name`, by which the callee takes it, if it does."""
    if name is None or all(each not in arguments for each in CACHE_NAMES if each != name):
        return arguments
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return others | {name: given_cache(arguments)}
