"""`autotune`: find the best quantization of a model within an accuracy budget."""

from .report import Report
from .space import WeightOnlySpace
from .tuner import TuningOptions, autotune, tune

__all__ = ["Report", "TuningOptions", "WeightOnlySpace", "autotune", "tune"]
