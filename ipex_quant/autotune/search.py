"""Which candidate to try next: generators that yield candidates and are sent the trial of each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from .candidate import Int8Candidate, WeightOnlyCandidate
from .trials import Trial

Search = Generator[Int8Candidate | WeightOnlyCandidate, Trial, Any]

TYPE_SHARE = 0.25
"""Share of the total error from which on layers of one type are tried together."""


@dataclass(frozen=True)
class Layer:
    """What the search knows of a layer: its `error` when quantized, its type, and how many weights it has."""

    name: str
    type: str
    error: float
    weights: int


def search_int8(candidates: Sequence[Int8Candidate], layers_of: Callable[[Int8Candidate], Sequence[Layer]]) -> Search:
    """First `candidates` as they are; then the best of them with the most sensitive of its `layers_of` left in float.

    The sets of layers to leave in float grow: the 1, 2, 4, ... most sensitive ones, and in between all layers of a type
    that makes up a good part of the error. Once a set meets the criterion, bisection looks for a smaller one, of its
    most sensitive layers.
    """
    trials: dict[Int8Candidate, Trial] = {}
    for candidate in candidates:
        trials[candidate] = yield candidate
    base = min(trials, key=lambda candidate: trials[candidate].loss)
    if trials[base].met:
        return
    layers = sorted(layers_of(base), key=lambda layer: (-layer.error, layer.name))

    def with_float(chosen: Sequence[Layer]) -> Int8Candidate:
        return base.with_float({*base.float_modules, *(layer.name for layer in chosen)})

    failed = 0
    for chosen, is_prefix in float_sets(layers):
        trial = yield with_float(chosen)
        if trial.met:
            break
        failed = len(chosen) if is_prefix else failed
    else:
        return
    lowest, highest = failed if is_prefix else 0, len(chosen)
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        trial = yield with_float(chosen[:middle])
        lowest, highest = (lowest, middle) if trial.met else (middle, highest)


def search_weight_only(candidates: Sequence[Sequence[WeightOnlyCandidate]]) -> Search:
    """The smallest size that meets the criterion by its first candidate; then the others of this and of smaller sizes.

    `candidates` are those of every size, smallest first. Sizes grow in steps that double until one meets the criterion,
    and bisection finds the smallest. Then smaller sizes are tried with all their candidates until none of a size meets
    it.
    """
    met: dict[WeightOnlyCandidate, bool] = {}

    def attempt(candidate: WeightOnlyCandidate) -> Search:
        if candidate not in met:
            trial = yield candidate
            met[candidate] = trial.met
        return met[candidate]

    last = len(candidates) - 1
    lowest, highest, step = -1, 0, 1
    while not (yield from attempt(candidates[highest][0])) and highest < last:
        lowest, highest, step = highest, min(highest + step, last), 2 * step
    while highest - lowest > 1 and met[candidates[highest][0]]:
        middle = (lowest + highest) // 2
        found = yield from attempt(candidates[middle][0])
        lowest, highest = (lowest, middle) if found else (middle, highest)
    for of_one_size in reversed(candidates[: highest + 1]):
        outcomes = []
        for candidate in of_one_size:
            outcomes.append((yield from attempt(candidate)))
        if not any(outcomes):
            return


def float_sets(layers: Sequence[Layer]) -> list[tuple[Sequence[Layer], bool]]:
    """Sets of layers to leave in float, most sensitive first, those with fewer weights first; never all of them.

    The flag tells the sets that are the most sensitive layers of all.
    """
    most = len(layers) - 1
    sizes = [size for i in range(most.bit_length()) if (size := 1 << i) < most] + [most] * (most > 0)
    sets: list[tuple[Sequence[Layer], bool]] = [(layers[:size], True) for size in sizes]
    total = sum(layer.error for layer in layers)
    for kind in dict.fromkeys(layer.type for layer in layers):
        alike = [layer for layer in layers if layer.type == kind]
        if 1 < len(alike) < len(layers) and sum(layer.error for layer in alike) >= TYPE_SHARE * total:
            sets.append((alike, False))
    unique = {frozenset(layer.name for layer in chosen): (chosen, is_prefix) for chosen, is_prefix in reversed(sets)}
    return sorted(unique.values(), key=lambda entry: (sum(layer.weights for layer in entry[0]), not entry[1]))


def best_trial(trials: Sequence[Trial], cost: Callable[[Trial], float]) -> Trial:
    """Of those that meet the criterion one of the least `cost`, the most accurate; without any, the most accurate."""
    met = [trial for trial in trials if trial.met]
    return min(met, key=lambda trial: (cost(trial), trial.loss)) if met else min(trials, key=lambda trial: trial.loss)
