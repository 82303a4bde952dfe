"""`parse`: check and convert values of a recipe's YAML by the annotations of the fields."""

from __future__ import annotations

import re
from enum import IntEnum
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

_SCHEME = re.compile(r"(\w+) (sym|asym) (?:g(\d{1,9})|per-channel)")


def parse(annotation: Any, value: Any) -> Any:
    """`value` converted to the type `annotation`; ValueError if it does not fit.

    Annotations are str, bool, int, float, an IntEnum (by its names in lower case), a `WeightScheme` (as it prints),
    ``X | None``, ``tuple[X, ...]`` (a list), ``dict[X, Y]``, and ``Annotated[X, check]`` with functions that raise
    ValueError.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        parsed = parse(arguments[0], value)
        for check in arguments[1:]:
            check(parsed)
        return parsed
    if origin in (Union, UnionType):
        return parse(next(each for each in arguments if each is not type(None)), value)
    if origin is tuple:
        return tuple(parse(arguments[0], each) for each in _of_type(list, value))
    if origin is dict:
        return {parse(arguments[0], key): parse(arguments[1], each) for key, each in _of_type(dict, value).items()}
    if annotation is WeightScheme:
        return _scheme(_of_type(str, value))
    if issubclass(annotation, IntEnum):
        names = {member.name.lower(): member for member in annotation}
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"expected one of {', '.join(names)}, got {value!r}")
        return names[value]
    return _of_type(annotation, value)


def written(value: Any) -> Any:
    """What `parse` makes `value` of again, as plain data for YAML."""
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, WeightScheme):
        return str(value)
    if isinstance(value, tuple):
        return [written(each) for each in value]
    if isinstance(value, dict):
        return {key: written(each) for key, each in value.items()}
    return value


def _scheme(text: str) -> WeightScheme:
    match = _SCHEME.fullmatch(text)
    if match is None or match[1].upper() not in WoqWeightDtype.__members__:
        raise ValueError(f"expected a scheme as 'int4 asym g64' or 'int8 sym per-channel', got {text[:60]!r}")
    size = PER_CHANNEL if match[3] is None else int(match[3])
    return WeightScheme(WoqWeightDtype[match[1].upper()], match[2] == "sym", size)


def _of_type(kind: type, value: Any) -> Any:
    # bool is an int in Python, but `samples: true` is a mistake; an int is a fine float.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, kind) if kind is float else kind):
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return kind(value)


def _at_least_one(value: int) -> None:
    if value < 1:
        raise ValueError(f"expected at least 1, got {value}")


def _from_0_to_1(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {value:g}")


def _compiles(value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from error


Count = Annotated[int, _at_least_one]
Fraction = Annotated[float, _from_0_to_1]
Regex = Annotated[str, _compiles]
