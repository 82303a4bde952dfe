"""Splitting nested arguments into streams, and joining nested results, along the dimensions that a hint names.

A *hint* is an int, the dimension along which tensors are split or joined; None, for what goes to every stream as it is,
or is taken from the first one; or a tuple, list or dict of hints, for the items of a container of the same form. An int
for a container holds for all tensors in it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch

Hint: TypeAlias = "int | Sequence[Hint] | Mapping[Any, Hint] | None"
OnTensors: TypeAlias = Callable[[list[torch.Tensor], int, str], torch.Tensor]


def check_hint(hint: Any, path: str) -> None:
    """Raise TypeError, which says where, unless `hint` is one."""
    if isinstance(hint, Mapping):
        for name, item in hint.items():
            check_hint(item, f"{path}[{name!r}]")
    elif isinstance(hint, (tuple, list)):
        for i, item in enumerate(hint):
            check_hint(item, f"{path}[{i}]")
    elif hint is not None and (isinstance(hint, bool) or not isinstance(hint, int)):
        raise TypeError(f"{path}: expected None, a dimension (int) or a tuple, list or dict of these, got {hint!r}")


def split(hint: Hint, value: Any, streams: int, path: str) -> list[Any]:
    """The share of `value` of each stream that gets one: at most `streams`, fewer if there are fewer rows.

    The rows of the tensors that `hint` names are dealt out evenly, the first streams get the ones that are left over.
    Shares are views. Without rows, the first stream gets them all the same.

    Raises ValueError if the tensors differ in their number of rows, or if there are none, and what `walk` raises.
    """
    sizes: dict[str, int] = {}

    def measure(tensors: list[torch.Tensor], dim: int, path: str) -> torch.Tensor:
        sizes[path] = tensors[0].size(dim)
        return tensors[0]

    walk(measure, hint, [value], path)
    counts = set(sizes.values())
    if not counts:
        raise ValueError(f"{path}: the input_split_hint {hint} names no tensor to split")
    if len(counts) > 1:
        raise ValueError(
            f"{path}: the tensors to split differ in size along their dimensions of the hint: "
            + ", ".join(f"{name} has {n}" for name, n in sizes.items())
            + "; give None to what every stream needs as it is"
        )

    def share(start: int, length: int) -> Any:
        return walk(lambda tensors, dim, _: tensors[0].narrow(dim, start, length), hint, [value], path)

    return [share(*rows) for rows in shares(counts.pop(), streams)]


def shares(count: int, parts: int) -> list[tuple[int, int]]:
    """Start and length of each part that is not empty, or of an empty one: equal, the first ones longer by the rest."""
    used = max(1, min(count, parts))
    each, rest = divmod(count, used)
    return [(i * each + min(i, rest), each + (i < rest)) for i in range(used)]


def join(hint: Hint, values: list[Any], path: str) -> Any:
    """The results of the streams as one: tensors concatenated along the dimensions in `hint`.

    Raises ValueError if tensors cannot be concatenated, and what `walk` raises.
    """

    def concatenate(tensors: list[torch.Tensor], dim: int, path: str) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        try:
            return torch.cat(tensors, dim)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: the streams' results cannot be concatenated along dimension {dim}: {error}; with "
                "concat_output=False they are returned as a list"
            ) from error

    return walk(concatenate, hint, values, path)


def walk(on_tensors: OnTensors, hint: Hint, values: list[Any], path: str) -> Any:
    """A structure as the first of `values` has it, with the result of `on_tensors` for tensors that `hint` names.

    `values` are structures of one form, such as the results of several streams. `on_tensors` gets the tensors that
    stand at one place in all of them, the dimension and the place. Everything else is taken from the first.

    Raises TypeError where `hint` names something that is neither a tensor nor a container nor None, and ValueError
    where it does not have the form of the values, or names a dimension that a tensor does not have; the message says
    where.
    """
    first = values[0]
    if hint is None:
        return first
    if isinstance(first, torch.Tensor) and all(isinstance(value, torch.Tensor) for value in values):
        if not isinstance(hint, int):
            raise ValueError(f"{path}: the hint {hint} is for a container, got a tensor")
        if any(not -value.dim() <= hint < value.dim() for value in values):
            raise ValueError(f"{path}: the hint says dimension {hint}, got a tensor of shape {list(first.shape)}")
        return on_tensors(values, hint, path)
    if all(value is None for value in values):
        return None
    if any(type(value) is not type(first) for value in values):
        raise ValueError(f"{path}: the streams' results differ in type: {sorted({type(v).__name__ for v in values})}")
    if isinstance(first, Mapping) or _is_dataclass_instance(first):
        return _walk_names(on_tensors, hint, values, path)
    if isinstance(first, (tuple, list)):
        return _walk_items(on_tensors, hint, values, path)
    raise TypeError(
        f"{path}: the hint says dimension {hint}, got {type(first).__name__}: only tensors and containers of tensors "
        "(tuple, list, mapping, dataclass) can be split and concatenated; give None to anything else"
    )


def _walk_names(on_tensors: OnTensors, hint: Any, values: list[Any], path: str) -> Any:
    if not isinstance(hint, (int, Mapping)):
        raise ValueError(f"{path}: the hint {hint} is no dict, got {type(values[0]).__name__}")
    items = [_named_items(value) for value in values]
    if any(item.keys() != items[0].keys() for item in items):
        raise ValueError(f"{path}: the streams' results differ in their names")
    result = dict(items[0])
    for name in result:
        where = f"{path}[{name!r}]"
        if isinstance(hint, int) or name in hint:
            inner = hint if isinstance(hint, int) else hint[name]
            result[name] = walk(on_tensors, inner, [item[name] for item in items], where)
        else:
            _require_no_tensors(result[name], where)
    return _with_items(values[0], result)


def _walk_items(on_tensors: OnTensors, hint: Any, values: list[Any], path: str) -> Any:
    first = values[0]
    if isinstance(hint, int):
        hint = [hint] * len(first)
    if isinstance(hint, Mapping) or len(hint) != len(first) or any(len(value) != len(first) for value in values):
        raise ValueError(
            f"{path}: the hint {hint} does not have the form of a {type(first).__name__} of {len(first)} items"
        )
    items = [walk(on_tensors, inner, [value[i] for value in values], f"{path}[{i}]") for i, inner in enumerate(hint)]
    return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)  # a namedtuple has fields


def _require_no_tensors(value: Any, path: str) -> None:
    """Raise ValueError if there is a tensor in `value`, which no hint names."""
    if next(_tensors(value), None) is not None:
        raise ValueError(f"{path}: the hint does not name it, and it holds tensors; give it a dimension or None")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping) or _is_dataclass_instance(value):
        for item in _named_items(value).values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _is_dataclass_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _named_items(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):  # transformers' results are mappings and dataclasses
        return dict(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _with_items(value: Any, items: dict[str, Any]) -> Any:
    """A copy of a mapping or dataclass with other items."""
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return items
    result = copy.copy(value)
    for name, item in items.items():
        if isinstance(value, MutableMapping):
            result[name] = item
        else:
            object.__setattr__(result, name, item)  # also of frozen ones
    return result
