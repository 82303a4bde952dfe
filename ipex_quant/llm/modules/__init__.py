"""Fused modules for large language models, as in ``ipex.llm.modules``."""

from typing import Any

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
from .mamba import MambaMixer
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
    "MambaMixer",
    "PagedAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "VarlenAttention",
]

_LOWER_CASE = tuple(name[0].lower() + name[1:] for name in __all__ if name.startswith("Linear"))
"""The linear fusions as IPEX's tutorials spell them: linearSilu, linear2SiluMul and so on."""


def __getattr__(name: str) -> Any:
    if name in _LOWER_CASE:
        return globals()[name[0].upper() + name[1:]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
