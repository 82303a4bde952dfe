"""Observers: modules that collect statistics of the tensors they see and answer quantization parameters."""

from torch.ao.quantization import PlaceholderObserver

from .foreign import check_reducible, describe_observer, has_data, observe, reduce_observer
from .histogram import HistogramObserver
from .minmax import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from .observer import Observer, ObserverFactory
from .smoothquant import SmoothQuantActivationObserver, SmoothQuantWeightObserver

__all__ = [
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "ObserverFactory",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "SmoothQuantActivationObserver",
    "SmoothQuantWeightObserver",
    "check_reducible",
    "describe_observer",
    "has_data",
    "observe",
    "reduce_observer",
]
