"""The quantized modules where IPEX has them."""

from .weight_only_linear import WeightOnlyQuantizedLinear

__all__ = ["WeightOnlyQuantizedLinear"]
