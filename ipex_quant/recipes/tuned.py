"""`tuned_recipe`: the recipe of what `autotune` found, which makes the same model again."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from ..autotune import Report
from ..autotune.candidate import WeightOnlyCandidate
from ..numerics.scheme import WeightScheme, WoqActQuantMode
from .recipe import ALGORITHMS, Calibrated, Recipe, WeightOnly


def tuned_recipe(
    report: Report, act_quant_mode: WoqActQuantMode, samples: int, sequence_length: int, name: str = "tuned"
) -> Recipe:
    """The recipe of the result of a weight-only search, calibrated on `samples` windows of `sequence_length` tokens.

    Raises ValueError for the report of a search that has not ended, or of another kind.
    """
    best = next((trial for trial in report.trials if trial.index == report.best), None)
    if best is None or best.recipe["kind"] != "weight_only":
        raise ValueError("report: expected one of a weight-only search that has ended")
    candidate = WeightOnlyCandidate.from_json(best.recipe)
    schemes = {name: scheme for name, scheme in candidate.schemes if scheme is not None}
    kind = ALGORITHMS[candidate.algorithm]
    common = Counter(schemes.values()).most_common(1)[0][0]
    settings = kind(
        weight_dtype=common.dtype,
        weight_qscheme=common.qscheme,
        group_size=common.group_size,
        lowp_mode=candidate.lowp_mode,
        act_quant_mode=act_quant_mode,
        schemes=scheme_patterns(schemes),
        **({"samples": samples, "sequence_length": sequence_length} if issubclass(kind, Calibrated) else {}),
    )
    speed = "" if best.measured_ms is None else f", {1e3 / best.measured_ms:.1f} tokens a second"
    description = (
        f"Found by autotune: {best.label}; {best.model_bytes / 1e6:.1f} MB in memory{speed}; "
        f"loss {best.loss:.4g}, allowed {report.criterion}."
    )
    in_float = [name for name, scheme in candidate.schemes if scheme is None]
    assert isinstance(settings, WeightOnly)
    return Recipe(name, settings, description, tuple(name_patterns(in_float)))


def scheme_patterns(schemes: Mapping[str, WeightScheme]) -> dict[str, WeightScheme]:
    """Regular expressions of the names, with their schemes."""
    together = defaultdict(list)
    for name, scheme in schemes.items():
        together[scheme].append(name)
    return {pattern: scheme for scheme, names in together.items() for pattern in name_patterns(names)}


def name_patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions that match `names`, those that differ in their first number together, and nothing else."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        before, number, after = (*re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1), "", "")[:3]
        together[before, after].append(number)
    return [
        re.escape(before) + (f"({'|'.join(numbers)})" if numbers != [""] else "") + re.escape(after) + "$"
        for (before, after), numbers in together.items()
    ]
