"""The quantized modules, in the place where IPEX has them."""

from .weight_only_linear import WeightOnlyQuantizedLinear

__all__ = ["WeightOnlyQuantizedLinear"]
