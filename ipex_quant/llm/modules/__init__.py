"""Fused modules for large language models, as in ``ipex.llm.modules``."""

from .kv_attention import IndirectAccessKVCacheAttention
from .linear import (
    Linear2SiluMul,
    LinearAdd,
    LinearAddAdd,
    LinearGelu,
    LinearMul,
    LinearNewGelu,
    LinearRelu,
    LinearSilu,
    LinearSiluMul,
)
from .moe import GatedMLPMOE
from .norm import FastLayerNorm, RMSNorm
from .paged import PagedAttention
from .rotary import RotaryEmbedding
from .varlen import VarlenAttention

__all__ = [
    "FastLayerNorm",
    "GatedMLPMOE",
    "IndirectAccessKVCacheAttention",
    "Linear2SiluMul",
    "LinearAdd",
    "LinearAddAdd",
    "LinearGelu",
    "LinearMul",
    "LinearNewGelu",
    "LinearRelu",
    "LinearSilu",
    "LinearSiluMul",
    "PagedAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "VarlenAttention",
]
