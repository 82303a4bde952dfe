"""Quantized linear layers made from a checkpoint's tensors, under IPEX's names."""

from ..nn import QuantDtype, QuantMethod
from ..nn import WeightOnlyQuantizedLinear as IPEXWeightOnlyQuantizedLinear

__all__ = ["IPEXWeightOnlyQuantizedLinear", "QuantDtype", "QuantMethod"]
