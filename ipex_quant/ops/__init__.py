"""Native ops: weight packing, weight-only, W8A8 and float linears, convolutions, the rest of a decoder, and the ISA.

Importing this package loads the native library and registers its ops under ``torch.ops.ipex_quant``.
"""

from .affinity import bind_team, set_team_affinity, team_affinity
from .attention import (
    attention,
    fused_rope_attention,
    paged_attention,
    paged_rope_attention,
    varlen_attention,
    write_cache,
    write_paged_cache,
)
from .conv import ConvGeometry, PackedConv, conv_dequantize, int8_conv, pack_conv, unpack_conv
from .decoder import DecoderCall, DecoderStructure, DecoderWeights, decoder_layers
from .embedding import woq_embedding
from .experts import (
    ExpertGate,
    PackedExperts,
    gate_arguments,
    pack_experts,
    run_experts,
    split_experts,
    unpack_experts,
    woq_experts,
)
from .float_linear import float_linear
from .gated import gelu_mul, gelu_mul_halves, silu_mul, silu_mul_halves
from .halves import join_halves, sgd_halves, split_halves
from .int8 import (
    PackedInt8,
    int8_dequantize,
    int8_linear,
    int8_linear_gated,
    pack_int8,
    quantize_activation,
    quantize_activation_per_token,
    unpack_int8,
)
from .isa import ISA_LEVELS, isa_name, multiplies_bfloat16, supported_isas
from .mamba import causal_conv1d, causal_conv1d_update, selective_scan
from .nibbles import transpose_nibbles
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .post_op import PostOp
from .rope import rotary
from .woq import (
    PackedWeight,
    kernel_name,
    pack_weight,
    quantize_weight,
    unpack_weight,
    woq_dequantize,
    woq_linear,
    woq_linear_gated,
    woq_linear_group,
)

__all__ = [
    "ISA_LEVELS",
    "ConvGeometry",
    "DecoderCall",
    "DecoderStructure",
    "DecoderWeights",
    "ExpertGate",
    "PackedConv",
    "PackedExperts",
    "PackedInt8",
    "PackedWeight",
    "PostOp",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bind_team",
    "causal_conv1d",
    "causal_conv1d_update",
    "conv_dequantize",
    "decoder_layers",
    "float_linear",
    "fused_rope_attention",
    "gate_arguments",
    "gelu_mul",
    "gelu_mul_halves",
    "int8_conv",
    "int8_dequantize",
    "int8_linear",
    "int8_linear_gated",
    "isa_name",
    "join_halves",
    "kernel_name",
    "layer_norm",
    "multiplies_bfloat16",
    "pack_conv",
    "pack_experts",
    "pack_int8",
    "pack_weight",
    "paged_attention",
    "paged_rope_attention",
    "quantize_activation",
    "quantize_activation_per_token",
    "quantize_weight",
    "rms_norm",
    "rotary",
    "run_experts",
    "selective_scan",
    "set_team_affinity",
    "sgd_halves",
    "silu_mul",
    "silu_mul_halves",
    "split_experts",
    "split_halves",
    "supported_isas",
    "team_affinity",
    "transpose_nibbles",
    "unpack_conv",
    "unpack_experts",
    "unpack_int8",
    "unpack_weight",
    "varlen_attention",
    "woq_dequantize",
    "woq_embedding",
    "woq_experts",
    "woq_linear",
    "woq_linear_gated",
    "woq_linear_group",
    "write_cache",
    "write_paged_cache",
]
