"""Fused modules to build large language models of, as in ``ipex.llm.modules``."""

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
from .rotary import RotaryEmbedding

__all__ = [
    "FastLayerNorm",
    "GatedMLPMOE",
    "Linear2SiluMul",
    "LinearAdd",
    "LinearAddAdd",
    "LinearGelu",
    "LinearMul",
    "LinearNewGelu",
    "LinearRelu",
    "LinearSilu",
    "LinearSiluMul",
    "RMSNorm",
    "RotaryEmbedding",
]
