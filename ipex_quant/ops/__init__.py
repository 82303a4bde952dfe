"""Native operations: weight packing, the weight-only and the W8A8 linear, and what they run on.

Importing this package loads the native library and registers its ops under ``torch.ops.ipex_quant``.
"""

from .int8 import (
    PackedInt8,
    int8_linear,
    int8_linear_requantized,
    pack_int8,
    quantize_activation,
    quantize_activation_per_token,
    unpack_int8,
)
from .isa import ISA_LEVELS, isa_name, supported_isas
from .woq import (
    PackedWeight,
    PostOp,
    kernel_name,
    pack_weight,
    quantize_weight,
    unpack_weight,
    woq_dequantize,
    woq_linear,
)

__all__ = [
    "ISA_LEVELS",
    "PackedInt8",
    "PackedWeight",
    "PostOp",
    "int8_linear",
    "int8_linear_requantized",
    "isa_name",
    "kernel_name",
    "pack_int8",
    "pack_weight",
    "quantize_activation",
    "quantize_activation_per_token",
    "quantize_weight",
    "supported_isas",
    "unpack_int8",
    "unpack_weight",
    "woq_dequantize",
    "woq_linear",
]
