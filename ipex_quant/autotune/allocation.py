"""`allocate`: choose a scheme for every group of layers within a budget of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..numerics.scheme import WeightScheme


@dataclass(frozen=True)
class Option:
    """The cost of one scheme for a group of layers: `bytes` of memory and an `error`; scheme None is float."""

    scheme: WeightScheme | None
    bytes: int
    error: float


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option] | None:
    """The options of all groups with the least total error within `budget` bytes; None if the smallest exceed it.

    Every group starts with its smallest option. Steps along the convex hulls of the groups' options are taken in the
    order of error saved per byte. That is optimal except for the bytes left at the end, which are spent greedily.
    """
    chosen = {name: min(choices, key=lambda o: (o.bytes, o.error)) for name, choices in options.items()}
    rest = budget - sum(option.bytes for option in chosen.values())
    if rest < 0:
        return None
    steps = []
    for name, choices in options.items():
        hull = _hull(choices)
        for old, new in itertools.pairwise(hull):
            steps.append(((old.error - new.error) / (new.bytes - old.bytes), name, old, new))
    for _, name, old, new in sorted(steps, key=lambda step: (-step[0], step[1])):
        if chosen[name] is old and new.bytes - old.bytes <= rest:
            rest -= new.bytes - old.bytes
            chosen[name] = new
    while True:
        fitting = [
            (chosen[name].error - option.error, name, option)
            for name, choices in options.items()
            for option in choices
            if option.error < chosen[name].error and option.bytes - chosen[name].bytes <= rest
        ]
        if not fitting:
            return chosen
        _, name, option = max(fitting, key=lambda entry: (entry[0], entry[1]))
        rest -= option.bytes - chosen[name].bytes
        chosen[name] = option


def _hull(choices: Sequence[Option]) -> list[Option]:
    """The lower convex hull of errors over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(old: Option, new: Option) -> float:
    return (old.error - new.error) / (new.bytes - old.bytes)
