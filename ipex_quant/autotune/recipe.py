"""What is tried: one way to quantize a model, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

AUTO = "auto"
"""The alpha that stands for one found for every share group, by output error."""


@dataclass(frozen=True)
class Int8Recipe:
    """Static INT8: SmoothQuant with `alpha`, or plain when it is None, calibrated on `samples` samples.

    `float_modules` are the names of the layers that stay in float.
    """

    alpha: float | str | None
    samples: int
    float_modules: tuple[str, ...] = ()

    def with_float(self, names: Iterable[str]) -> Int8Recipe:
        """The same with other layers left in float."""
        return replace(self, float_modules=tuple(sorted(names)))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "int8", **asdict(self), "float_modules": list(self.float_modules)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Int8Recipe:
        return cls(values["alpha"], values["samples"], tuple(values["float_modules"]))

    def __str__(self) -> str:
        smoothing = "static" if self.alpha is None else f"SmoothQuant alpha {self.alpha}"
        left = f", {len(self.float_modules)} in float" * bool(self.float_modules)
        return f"INT8 {smoothing}, {self.samples} samples{left}"
