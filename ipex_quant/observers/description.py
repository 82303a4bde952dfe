"""Observers from their descriptions in a qconf summary."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.quantization import PlaceholderObserver

from .foreign import ARGUMENTS
from .histogram import HistogramObserver
from .minmax import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from .observer import ObserverFactory
from .smoothquant import SmoothQuantActivationObserver, SmoothQuantWeightObserver

_SINGLE = {
    cls.__name__: cls
    for cls in (HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver)
}
_PAIRS = {cls.__name__: cls for cls in (SmoothQuantActivationObserver, SmoothQuantWeightObserver)}
_TORCH_VALUES = {
    str(value): value
    for value in (
        *(torch.quint8, torch.qint8, torch.float32, torch.bfloat16, torch.float16),
        *(torch.per_tensor_affine, torch.per_tensor_symmetric),
        *(torch.per_channel_affine, torch.per_channel_symmetric),
    )
}


def observer_from_description(description: dict[str, Any]) -> nn.Module:
    """A new observer of ours as `describe_observer` describes it; unknown keys are ignored.

    Raises ValueError for an unknown class or value.
    """
    return _factory(description)()


def _factory(description: dict[str, Any]) -> ObserverFactory:
    name = description.get("name")
    if name in _PAIRS:
        parts = {key: _factory(value) for key, value in description.items() if key.endswith("_observer")}
        settings = {key: description[key] for key in ("alpha", "smooth_quant_enabled") if key in description}
        return ObserverFactory(_PAIRS[name], **settings, **parts)
    if name == PlaceholderObserver.__name__:
        settings = {key: description[key] for key in ("dtype", "is_dynamic") if key in description}
        return ObserverFactory(PlaceholderObserver, **_arguments(settings))
    if name not in _SINGLE:
        expected = ", ".join(sorted([*_SINGLE, *_PAIRS, PlaceholderObserver.__name__]))
        raise ValueError(f"observer: expected one of {expected}, got {name!r}")
    return ObserverFactory(_restored, _SINGLE[name], description)


def _restored(cls: type[nn.Module], description: dict[str, Any]) -> nn.Module:
    codes = {key: description[key] for key in ("quant_min", "quant_max") if key in description}
    rest = {key: description[key] for key in ARGUMENTS if key in description and key not in codes}
    observer = cls(**_arguments(rest))
    if any(getattr(observer, key) != value for key, value in codes.items()):
        observer = cls(**_arguments(rest), **codes)
        observer.quant_min, observer.quant_max = codes["quant_min"], codes["quant_max"]  # halved already
    return observer


def _arguments(described: dict[str, Any]) -> dict[str, Any]:
    for key in ("dtype", "qscheme"):
        if key in described and described[key] not in _TORCH_VALUES:
            raise ValueError(f"observer: {key}: expected one of {', '.join(_TORCH_VALUES)}, got {described[key]!r}")
    return {key: _TORCH_VALUES[value] if key in ("dtype", "qscheme") else value for key, value in described.items()}
