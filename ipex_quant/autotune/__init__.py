"""`autotune`: find the best quantization of a model within an accuracy budget."""

from .report import Report
from .tuner import TuningOptions, autotune, tune
from .weight_only import WeightOnlySpace

__all__ = ["Report", "TuningOptions", "WeightOnlySpace", "autotune", "tune"]
