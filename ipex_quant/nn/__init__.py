"""Quantized modules."""

from . import modules
from .experts import WeightOnlyQuantizedExperts
from .int8_conv2d import Int8Conv2d
from .int8_linear import Int8Linear
from .quantized_module import Placeholder, QuantizedModule
from .weight_only_linear import WeightOnlyQuantizedLinear
from .weight_tensors import QuantDtype, QuantMethod, WoqWeightFormat

__all__ = [
    "Int8Conv2d",
    "Int8Linear",
    "Placeholder",
    "QuantDtype",
    "QuantMethod",
    "QuantizedModule",
    "WeightOnlyQuantizedExperts",
    "WeightOnlyQuantizedLinear",
    "WoqWeightFormat",
    "modules",
]
