"""Quantized modules."""

from . import functional, modules
from .expert_linears import WeightOnlyQuantizedExpertLinears
from .experts import WeightOnlyQuantizedExperts
from .int8_conv import Int8Conv
from .int8_linear import Int8Linear
from .int8_recurrent import Int8Recurrent, Int8RecurrentCell
from .multihead_attention import SplitMultiheadAttention
from .quantized_embedding import QuantizedEmbedding
from .quantized_module import Placeholder, QuantizedModule
from .weight_only_linear import WeightOnlyQuantizedLinear
from .weight_tensors import QuantDtype, QuantMethod, WoqWeightFormat

__all__ = [
    "Int8Conv",
    "Int8Linear",
    "Int8Recurrent",
    "Int8RecurrentCell",
    "Placeholder",
    "QuantDtype",
    "QuantMethod",
    "QuantizedEmbedding",
    "QuantizedModule",
    "SplitMultiheadAttention",
    "WeightOnlyQuantizedExpertLinears",
    "WeightOnlyQuantizedExperts",
    "WeightOnlyQuantizedLinear",
    "WoqWeightFormat",
    "functional",
    "modules",
]
