"""Candidates of a search: each is one way to quantize a model, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype

AUTO = "auto"
"""The alpha that means: search one for every share group, by output error."""


@dataclass(frozen=True)
class Int8Candidate:
    """Static INT8, calibrated on `samples` samples: SmoothQuant with `alpha`, or no smoothing if it is None.

    `float_modules` names the layers that stay in float.
    """

    alpha: float | str | None
    samples: int
    float_modules: tuple[str, ...] = ()

    def with_float(self, names: Iterable[str]) -> Int8Candidate:
        """This candidate with the layers `names` in float."""
        return replace(self, float_modules=tuple(sorted(names)))

    def to_json(self) -> dict[str, Any]:
        values = {"alpha": self.alpha, "samples": self.samples, "float_modules": list(self.float_modules)}
        return {"kind": "int8", **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Int8Candidate:
        return cls(values["alpha"], values["samples"], tuple(values["float_modules"]))

    def __str__(self) -> str:
        smoothing = "static" if self.alpha is None else f"SmoothQuant alpha {self.alpha}"
        left = f", {len(self.float_modules)} in float" * bool(self.float_modules)
        return f"INT8 {smoothing}, {self.samples} samples{left}"


@dataclass(frozen=True)
class WeightOnlyCandidate:
    """Weight-only quantization: algorithm, compute mode, and the scheme of every layer by name (None in float)."""

    algorithm: str
    lowp_mode: WoqLowpMode
    schemes: tuple[tuple[str, WeightScheme | None], ...]

    def to_json(self) -> dict[str, Any]:
        schemes = {
            name: None if s is None else {"dtype": s.dtype.name, "symmetric": s.symmetric, "group_size": s.group_size}
            for name, s in self.schemes  # of quantized layers, which have neither minimums nor super scales
        }
        return {
            "kind": "weight_only",
            "algorithm": self.algorithm,
            "lowp_mode": self.lowp_mode.name,
            "schemes": schemes,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WeightOnlyCandidate:
        schemes = (
            (name, None if s is None else WeightScheme(WoqWeightDtype[s["dtype"]], s["symmetric"], s["group_size"]))
            for name, s in values["schemes"].items()
        )
        return cls(values["algorithm"], WoqLowpMode[values["lowp_mode"]], tuple(schemes))

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(scheme for _, scheme in self.schemes if scheme is not None))
        what = str(kinds[0]) if len(kinds) == 1 else f"mixed, {len(kinds)} schemes"
        in_float = sum(scheme is None for _, scheme in self.schemes)
        left = f", {in_float} in float" * bool(in_float)
        return f"{self.algorithm.upper()} {what}{left}, computed in {self.lowp_mode.name}"
