"""Native operations: weight packing and the weight-only linear, with the information about what they run on.

Importing this package loads the native library and registers its ops under ``torch.ops.ipex_quant``.
"""

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
    "PackedWeight",
    "PostOp",
    "isa_name",
    "kernel_name",
    "pack_weight",
    "quantize_weight",
    "supported_isas",
    "unpack_weight",
    "woq_dequantize",
    "woq_linear",
]
