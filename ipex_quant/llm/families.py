"""Families of decoder layers as data: how transformers names and orders the parts of a layer.

`FAMILIES` maps the name of a layer's class to what `ipex_quant.llm.decoder` has to know to run it with fewer calls.
To add a family, read the `forward` of its layer, attention and MLP in transformers, describe them here, and add a tiny
configuration to ``tests/llm/test_families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any


class Layout(Enum):
    """In which order projections give query (Q), key (K) and value (V) heads."""

    SEPARATE = auto()
    """Three linear layers."""

    BLOCKS = auto()
    """One layer: all of Q, then all of K, then all of V."""

    GROUPS = auto()
    """One layer: for every K/V head the Q heads that share it (one, several or all), then its K, then its V."""

    QUARTERS = auto()
    """One layer: four parts, each with a quarter of the Q heads, then of V, then of K."""


class Rope(Enum):
    """How positions rotate queries and keys."""

    NONE = auto()
    HALF = auto()
    """Feature i goes with feature i + R / 2; the model gives cosines and sines ``[.., R]``."""

    INTERLEAVED = auto()
    """Feature 2 i goes with 2 i + 1; cosines and sines ``[.., R]`` of which the second half repeats the first."""

    TWICE = auto()
    """As INTERLEAVED, with every value of the cosines and sines twice, one after the other."""

    TABLE = auto()
    """As INTERLEAVED, with sines and cosines ``[positions, R]`` in the buffer `embed_positions` of the attention."""


class Residual(Enum):
    """Where a layer adds its input."""

    SEQUENTIAL = auto()
    """``h = x + attention(norm(x)); h + mlp(norm(h))``"""

    PARALLEL = auto()
    """``x + attention(norm(x)) + mlp(norm(x))``, with one norm or two"""

    POST_NORM = auto()
    """``h = norm(x + attention(x)); norm(h + mlp(h))``"""


@dataclass(frozen=True)
class Attention:
    """Names in an attention module, which is at `module` in its layer."""

    module: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    layout: Layout = Layout.SEPARATE
    rope: Rope = Rope.HALF
    norms: tuple[str, ...] = ()
    """Norms of every query and key head, before the rotation; a list of layer norms has one for each head."""

    joint_norms: bool = False
    """The norms are over the features of all heads at once."""

    clip: str = ""
    """Attribute with the largest magnitude of queries, keys and values, or none."""

    alibi: bool = False
    """Scores fall with the distance, at a rate that each head has of its own."""

    masked_is_true: bool = False
    """The mask is true where attention does not go."""

    position_bias: bool = False
    """What the layer gets as `position_bias`, or the module computes, is added to the scores."""

    scale: str = "scaling"
    """Attribute with what scores are multiplied by; where there is none, the inverse root of the head size."""

    softcap: str = ""
    """Attribute with the bound c of scores, ``c * tanh(score / c)``, or none."""

    head_size: str = "head_dim"
    index: str = "layer_idx"
    cache: str = "past_key_values"
    """Keyword that brings the layer the cache."""


@dataclass(frozen=True)
class Mlp:
    """Names in an MLP, which is at `module` in its layer, or with "" is the layer itself."""

    module: str = "mlp"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Gate and up, both in one layer, or the only linear before the activation."""

    output: str = "down_proj"
    activation: str = "act_fn"
    gated: bool = True


@dataclass(frozen=True)
class Family:
    """How one class of decoder layers computes.

    - `norms` are those of attention and MLP, one name where they share it.
    - `mlp` None calls the layer's `mlp` as it is.
    - `cross` is attention to an encoder, with its norm, which a SEQUENTIAL layer has before the MLP.
    - `keywords` are arguments of the layer, besides those that all may have, that are used or not needed.
    - `returns` are keywords that the layer returns after the hidden states, None where they were not given.
    - `clamps_float16`: float16 is clamped, which is left to the stock layer.
    - `requires` maps attributes to the values they have to have, where the layer has them; other layers stay stock.
    """

    attention: Attention = Attention()
    mlp: Mlp | None = Mlp()
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    residual: Residual = Residual.SEQUENTIAL
    cross: Attention | None = None
    cross_norm: str = ""
    keywords: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    clamps_float16: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Family()
_QWEN3_ATTENTION = Attention(norms=("q_norm", "k_norm"))
_GATE_UP = Mlp(inputs=("gate_up_proj",), activation="activation_fn")
_PHI = Family(
    Attention(output="dense"),
    Mlp("mlp", ("fc1",), "fc2", "activation_fn", gated=False),
    norms=("input_layernorm",),
    residual=Residual.PARALLEL,
    requires={"self_attn.qk_layernorm": False},
)
_STABLELM = Family(requires={"self_attn.qk_layernorm": False, "use_parallel_residual": False})
_STABLELM_PARALLEL = Family(
    norms=("input_layernorm",),
    residual=Residual.PARALLEL,
    requires={"self_attn.qk_layernorm": False, "use_parallel_residual": True},
)
_NEOX = Family(
    Attention("attention", ("query_key_value",), "dense", Layout.GROUPS, head_size="head_size", cache="layer_past"),
    Mlp("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "act", gated=False),
    requires={"use_parallel_residual": False},
)
_GPTJ = Family(
    Attention("attn", output="out_proj", rope=Rope.TABLE, cache="layer_past"),
    Mlp("mlp", ("fc_in",), "fc_out", "act", gated=False),
    norms=("ln_1",),
    residual=Residual.PARALLEL,
    returns=("attention_weights",),
)
_OPT = Family(
    Attention(output="out_proj", rope=Rope.NONE),
    Mlp("", ("fc1",), "fc2", "activation_fn", gated=False),
    ("self_attn_layer_norm", "final_layer_norm"),
    requires={"do_layer_norm_before": True},
)
_BLOOM = Family(
    Attention(
        "self_attention", ("query_key_value",), "dense", Layout.GROUPS, Rope.NONE, alibi=True, cache="layer_past"
    ),
    Mlp("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "gelu_impl", gated=False),
    keywords=("alibi",),
    returns=("attention_weights",),
    requires={"apply_residual_connection_post_layernorm": False, "self_attention.slow_but_exact": False},
)
_MPT = Family(
    Attention(
        "attn",
        ("Wqkv",),
        "out_proj",
        Layout.BLOCKS,
        Rope.NONE,
        alibi=True,
        masked_is_true=True,
        scale="softmax_scale",
        cache="layer_past",
    ),
    Mlp("ffn", ("up_proj",), "down_proj", "act", gated=False),
    ("norm_1", "norm_2"),
    keywords=("position_bias",),
    returns=("attention_weights",),
    requires={"attn.clip_qkv": None},
)
_GPT_BIGCODE = Family(
    Attention("attn", ("c_attn",), "c_proj", Layout.BLOCKS, Rope.NONE, cache="layer_past"),
    Mlp("mlp", ("c_fc",), "c_proj", "act", gated=False),
    ("ln_1", "ln_2"),
    keywords=("encoder_attention_mask",),
    requires={"attn.multi_query": True, "crossattention": None},
)
_GIT = Family(
    Attention(
        "attention",
        ("self.query", "self.key", "self.value"),
        "output.dense",
        rope=Rope.NONE,
        head_size="self.attention_head_size",
        index="self.layer_idx",
    ),
    Mlp("", ("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn", gated=False),
    ("attention.output.LayerNorm", "output.LayerNorm"),
    Residual.POST_NORM,
)
_WHISPER = Family(
    _OPT.attention,
    _OPT.mlp,
    _OPT.norms,
    clamps_float16=True,
)
_WHISPER_DECODER = replace(
    _WHISPER,
    cross=Attention("encoder_attn", output="out_proj", rope=Rope.NONE),
    cross_norm="encoder_attn_layer_norm",
    keywords=("encoder_hidden_states", "encoder_attention_mask"),
    clamps_float16=False,
)


def _t5() -> tuple[Family, ...]:
    """Layers of encoder and decoder, with a gate or without."""
    options = {"rope": Rope.NONE, "projections": ("q", "k", "v"), "output": "o", "head_size": "key_value_proj_dim"}
    families = []
    for decoder in (False, True):
        last = "layer.2" if decoder else "layer.1"
        for gated in (False, True):
            inputs = ("wi_0", "wi_1") if gated else ("wi",)
            family = Family(
                Attention("layer.0.SelfAttention", position_bias=True, **options),
                Mlp(f"{last}.DenseReluDense", inputs, "wo", "act", gated),
                ("layer.0.layer_norm", f"{last}.layer_norm"),
                cross=Attention("layer.1.EncDecAttention", **options) if decoder else None,
                cross_norm="layer.1.layer_norm",
                keywords=(
                    "position_bias",
                    "encoder_hidden_states",
                    "encoder_attention_mask",
                    "encoder_decoder_position_bias",
                ),
                returns=("position_bias", "encoder_decoder_position_bias"),
                clamps_float16=True,
                requires={"is_decoder": decoder, "layer.0.SelfAttention.config.is_gated_act": gated},
            )
            families.append(family)
    return tuple(families)


def _falcon() -> tuple[Family, ...]:
    """With one norm, two or none of its own for the MLP, with rotated positions or ALiBi, which comes in the mask."""
    norms = {
        (True, 2): ("ln_attn", "ln_mlp"),
        (True, 1): ("input_layernorm",),
        (True, None): ("input_layernorm",),
        (False, None): ("input_layernorm", "post_attention_layernorm"),
    }
    return tuple(
        Family(
            Attention("self_attention", ("query_key_value",), "dense", Layout.GROUPS, rope, cache="layer_past"),
            _NEOX.mlp,
            names,
            Residual.PARALLEL if parallel else Residual.SEQUENTIAL,
            keywords=("alibi",),
            returns=("attention_weights",),
            requires={
                "config.parallel_attn": parallel,
                "config.num_ln_in_parallel_attn": count,
                "config.alibi": rope is Rope.NONE,
            },
        )
        for (parallel, count), names in norms.items()
        for rope in (Rope.HALF, Rope.NONE)
    )


FAMILIES: dict[str, tuple[Family, ...]] = {
    "LlamaDecoderLayer": (_LLAMA,),
    "MistralDecoderLayer": (_LLAMA,),
    "MixtralDecoderLayer": (replace(_LLAMA, mlp=None),),
    "Qwen2DecoderLayer": (_LLAMA,),
    "Qwen3DecoderLayer": (Family(_QWEN3_ATTENTION),),
    "Qwen3MoeDecoderLayer": (Family(_QWEN3_ATTENTION, mlp=None),),
    "GemmaDecoderLayer": (_LLAMA,),
    "GlmDecoderLayer": (Family(Attention(rope=Rope.INTERLEAVED), _GATE_UP),),
    "Phi3DecoderLayer": (Family(Attention(projections=("qkv_proj",), layout=Layout.BLOCKS), _GATE_UP),),
    "PhiDecoderLayer": (_PHI,),
    "StableLmDecoderLayer": (_STABLELM, _STABLELM_PARALLEL),
    "GPTNeoXLayer": (
        _NEOX,
        replace(_NEOX, residual=Residual.PARALLEL, requires={"use_parallel_residual": True}),
    ),
    "GPTJBlock": (_GPTJ,),
    "CodeGenBlock": (
        replace(
            _GPTJ,
            attention=Attention("attn", ("qkv_proj",), "out_proj", Layout.QUARTERS, Rope.TABLE, cache="layer_past"),
        ),
    ),
    "OPTDecoderLayer": (
        _OPT,
        replace(_OPT, residual=Residual.POST_NORM, requires={"do_layer_norm_before": False}),
    ),
    "FalconDecoderLayer": _falcon(),
    "BloomBlock": (_BLOOM,),
    "MptBlock": (_MPT,),
    "GPTBigCodeBlock": (_GPT_BIGCODE,),
    "GitLayer": (_GIT,),
    "T5Block": _t5(),
    "WhisperEncoderLayer": (_WHISPER,),
    "WhisperDecoderLayer": (_WHISPER_DECODER,),
}
"""Class name of a layer: the ways it can be, of which the first whose `requires` hold is taken."""
