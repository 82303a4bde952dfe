"""Finding the best recipe within an accuracy budget."""

from .report import Report
from .tuner import autotune
from .weight_only import WeightOnlySpace

__all__ = ["Report", "WeightOnlySpace", "autotune"]
