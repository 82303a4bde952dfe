"""Functions to build large language models of, as in ``ipex.llm.functional``."""

from .modules.gated import gelu_mul, silu_mul
from .modules.norm import add_layer_norm, add_rms_norm, fast_layer_norm, rms_norm
from .modules.rotary import rotary_embedding

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "fast_layer_norm",
    "gelu_mul",
    "rms_norm",
    "rotary_embedding",
    "silu_mul",
]
