"""Functions that treat torch.ao's observers as ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.observer as torch_observers
import torch.distributed as dist
from torch import nn

from .minmax import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from .observer import Observer, check_finite

_REDUCIBLE = {
    torch_observers.MinMaxObserver: MinMaxObserver,
    torch_observers.PerChannelMinMaxObserver: PerChannelMinMaxObserver,
}
"""torch.ao's observers, exactly these classes, and our own whose statistics and reduction are the same."""


ARGUMENTS = (
    *("averaging_constant", "ch_axis", "bins"),
    *("dtype", "qscheme", "reduce_range", "quant_min", "quant_max", "is_dynamic"),
)
"""Attributes that a description of an observer holds, if it has them."""


def observe(observer: nn.Module, x: torch.Tensor) -> None:
    """Show `x` to an observer, ours or torch.ao's; ValueError when it holds NaN or Inf."""
    if _is_ours(observer) or not x.numel() or not x.is_floating_point():
        observer(x)
        return
    check_finite(*torch.aminmax(x.detach()))
    observer(x)


def has_data(observer: nn.Module) -> bool:
    """Whether an observer, ours or torch.ao's, has seen any value; one without a range never has."""
    if _is_ours(observer):
        return observer.has_data
    low = getattr(observer, "min_val", None)
    return low is not None and low.numel() > 0 and bool(torch.isfinite(low).all())


def describe_observer(observer: nn.Module) -> dict[str, Any]:
    """The class and arguments of an observer, ours or torch.ao's, with the keys and values IPEX 2.8 writes."""
    if hasattr(observer, "describe"):
        return observer.describe()
    values = {name: getattr(observer, name, None) for name in ARGUMENTS}
    described = {name: _json_value(value) for name, value in values.items() if value is not None}
    return {"name": type(observer).__name__, **described}


def check_reducible(observer: nn.Module) -> None:
    """TypeError, naming the class, when `reduce_observer` cannot combine the statistics of several ranks."""
    observer = getattr(observer, "active", observer)
    if isinstance(observer, MovingAverageMinMaxObserver):
        observer.reduce()
    if not isinstance(observer, Observer) and type(observer) not in _REDUCIBLE:
        raise TypeError(
            f"{type(observer).__module__}.{type(observer).__name__}: its statistics cannot be combined over ranks; "
            "use an observer of ipex_quant.observers, or calibrate in one process"
        )


def reduce_observer(observer: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Combine an observer's statistics over the ranks of `group`; TypeError where `check_reducible` raises it."""
    check_reducible(observer)
    if _is_ours(observer):
        observer.reduce(group)
        return
    stand_in = _REDUCIBLE[type(observer)]()
    stand_in.min_val, stand_in.max_val = observer.min_val, observer.max_val
    stand_in.reduce(group)
    observer.min_val, observer.max_val = stand_in.min_val, stand_in.max_val


def _is_ours(observer: nn.Module) -> bool:
    return hasattr(observer, "has_data")


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, (torch.dtype, torch.qscheme)) else value
