"""Building blocks of large language models, as in ``ipex.llm.functional``."""

from .modules.gated import gelu_mul, silu_mul
from .modules.kv_attention import indirect_access_kv_cache_attention
from .modules.lora import (
    bgmv_expand,
    bgmv_expand_slice,
    bgmv_shrink,
    sgmv_expand,
    sgmv_expand_slice,
    sgmv_shrink,
)
from .modules.norm import add_layer_norm, add_rms_norm, fast_layer_norm, rms_norm
from .modules.rotary import rotary_embedding
from .modules.varlen import varlen_attention

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "fast_layer_norm",
    "gelu_mul",
    "indirect_access_kv_cache_attention",
    "rms_norm",
    "rotary_embedding",
    "sgmv_expand",
    "sgmv_expand_slice",
    "sgmv_shrink",
    "silu_mul",
    "varlen_attention",
]
