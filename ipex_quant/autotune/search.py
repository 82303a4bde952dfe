"""Searches: generators that yield the next candidate and receive its trial."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from .candidate import Int8Candidate, WeightOnlyCandidate
from .trials import Trial

Search = Generator[Int8Candidate | WeightOnlyCandidate, Trial, Any]

TYPE_SHARE = 0.25
"""Share of the total error from which on all layers of one type are left in float together."""

GUESSES = 4
"""Attempts at sizes that are predicted; a prediction that has not closed in on one by then is a bad one."""


@dataclass(frozen=True)
class Layer:
    """A layer in a search: its type, its `error` when quantized, and its number of weights."""

    name: str
    type: str
    error: float
    weights: int


def search_int8(candidates: Sequence[Int8Candidate], layers_of: Callable[[Int8Candidate], Sequence[Layer]]) -> Search:
    """Yield all `candidates`, then the best of them with the most sensitive of its `layers_of` left in float.

    The sets of layers in float grow: the 1, 2, 4, ... most sensitive ones, and in between all layers of a type that
    makes at least `TYPE_SHARE` of the error. Once a set meets the criterion, bisection looks for a smaller set of its
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


def search_weight_only(
    candidates: Sequence[Sequence[WeightOnlyCandidate]], guess: Callable[[], int], thorough: bool = True
) -> Search:
    """Find the smallest size whose first candidate meets the criterion; then, if `thorough`, try what else may do.

    `candidates` are lists of candidates of one size each, smallest first. ``guess()`` predicts, from the trials so far,
    which size is the smallest. If `thorough`, all candidates of this and of smaller sizes are tried, until none of a
    size meets the criterion.
    """
    met: dict[WeightOnlyCandidate, bool] = {}

    def attempt(candidate: WeightOnlyCandidate) -> Search:
        if candidate not in met:
            trial = yield candidate
            met[candidate] = trial.met
        return met[candidate]

    highest = yield from first_success(len(candidates), lambda index: attempt(candidates[index][0]), guess)
    for of_one_size in reversed(candidates[: highest + 1] if thorough else []):
        outcomes = []
        for candidate in of_one_size:
            outcomes.append((yield from attempt(candidate)))
        if not any(outcomes):
            return


def search_largest(candidates: Sequence[Sequence[WeightOnlyCandidate]], thorough: bool = True) -> Search:
    """Try the `candidates` of the largest size, all of them if `thorough`; smaller sizes only where none is met."""
    for of_one_size in reversed(candidates):
        any_met = False
        for candidate in of_one_size:
            trial = yield candidate
            any_met = any_met or trial.met
            if any_met and not thorough:
                return
        if any_met:
            return


def first_success(count: int, attempt: Callable[[int], Search], guess: Callable[[], int]) -> Search:
    """Return the first index below `count` whose `attempt` returns true, if all later ones' do; `count` if none does.

    What ``guess()`` predicts is attempted first; after `GUESSES` attempts, bisection goes on.
    """
    lowest, highest, attempts = -1, count, 0
    while highest - lowest > 1:
        index = guess() if attempts < GUESSES else (lowest + highest) // 2
        index = min(max(index, lowest + 1), highest - 1)
        lowest, highest = (lowest, index) if (yield from attempt(index)) else (index, highest)
        attempts += 1
    return highest


def float_sets(layers: Sequence[Layer]) -> list[tuple[Sequence[Layer], bool]]:
    """Sets of `layers` to leave in float, sorted by their number of weights; never all layers.

    `layers` are sorted, most sensitive first. The flag is true for a set of the most sensitive layers, false for a set
    of one type.
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
    """The trial of least `cost`, then least loss, among those that meet the criterion; if none does, of least loss."""
    met = [trial for trial in trials if trial.met]
    return min(met, key=lambda trial: (cost(trial), trial.loss)) if met else min(trials, key=lambda trial: trial.loss)
