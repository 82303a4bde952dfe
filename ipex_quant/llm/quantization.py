"""IPEX's names for quantized linear layers made of a checkpoint's tensors."""

from ..nn import QuantDtype, QuantMethod
from ..nn import WeightOnlyQuantizedLinear as IPEXWeightOnlyQuantizedLinear

__all__ = ["IPEXWeightOnlyQuantizedLinear", "QuantDtype", "QuantMethod"]
