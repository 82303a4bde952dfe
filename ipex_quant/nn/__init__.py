"""Quantized modules."""

from . import modules
from .weight_only_linear import WeightOnlyQuantizedLinear
from .weight_tensors import QuantDtype, QuantMethod, WoqWeightFormat

__all__ = ["QuantDtype", "QuantMethod", "WeightOnlyQuantizedLinear", "WoqWeightFormat", "modules"]
