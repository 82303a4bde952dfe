"""`Criterion`: how much of the metric may be lost; `measured`: a checked call of the metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

DEFAULT = {"relative": 0.01}


@dataclass(frozen=True)
class Criterion:
    """The largest allowed loss: the float model's metric minus the metric, if `relative` divided by the former.

    A higher metric is better. The default allows any loss.
    """

    relative: bool = False
    tolerance: float = math.inf

    @classmethod
    def of(cls, value: Mapping[str, float] | None) -> Criterion:
        """Read ``{"relative": 0.01}`` (the default for None) or ``{"absolute": 0.5}``; else TypeError or ValueError."""
        value = DEFAULT if value is None else value
        if not isinstance(value, Mapping):
            raise TypeError(f'accuracy_criterion: expected a dict as {{"relative": 0.01}}, got {value!r}')
        if len(value) != 1 or next(iter(value)) not in ("relative", "absolute"):
            raise ValueError(f'accuracy_criterion: expected one key, "relative" or "absolute", got {dict(value)!r}')
        ((kind, tolerance),) = value.items()
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
            raise TypeError(f"accuracy_criterion: expected a number as largest loss, got {tolerance!r}")
        if not math.isfinite(tolerance):
            raise ValueError(f"accuracy_criterion: expected a finite largest loss, got {tolerance}")
        return cls(kind == "relative", float(tolerance))

    def loss(self, baseline: float, metric: float) -> float:
        """How much worse `metric` is than `baseline`; negative when it is better."""
        return (baseline - metric) / abs(baseline) if self.relative else baseline - metric

    def met(self, loss: float) -> bool:
        """Whether `loss` is allowed."""
        return loss <= self.tolerance

    def check_baseline(self, baseline: float) -> None:
        """Raise ValueError if a loss relative to `baseline` is undefined."""
        if self.relative and baseline == 0:
            raise ValueError(
                'accuracy_criterion: the float model has the metric 0, which no loss is relative to; use "absolute"'
            )

    def __str__(self) -> str:
        if self.tolerance == math.inf:
            return "any"
        return f"{self.tolerance:g} {'relative' if self.relative else 'absolute'}"


def measured(eval_func: Callable[[Any], float], model: torch.nn.Module) -> float:
    """The metric of `model` by `eval_func`; TypeError unless it is a number, ValueError unless it is finite."""
    value = eval_func(model)
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; return metric.item()" if isinstance(value, torch.Tensor) else ""
        raise TypeError(f"eval_func: expected a number, of which more is better, got {_described(value)}{hint}")
    if not math.isfinite(value):
        raise ValueError(f"eval_func: expected a finite number, got {float(value)}; check the metric and its data")
    return float(value)


def _described(value: object) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)
