"""Families of decoder layers as data: how transformers names and orders the parts of a layer.

`FAMILIES` maps the name of a layer's class to the names by which `ipex_quant.llm.decoder` finds its parts.
To add a family, read the `forward` of its layer, attention and MLP in transformers, describe them here, and add a tiny
configuration to ``tests/llm/decoder/test_families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any


class Layout(Enum):
    """The order of query (Q), key (K) and value (V) heads in the projections' output."""

    SEPARATE = auto()
    """Three linear layers."""

    BLOCKS = auto()
    """One layer: all of Q, then all of K, then all of V."""

    GROUPS = auto()
    """One layer: for every K/V head the Q heads that share it (one, several or all), then its K, then its V."""

    QUARTERS = auto()
    """One layer: four parts, each with a quarter of the Q heads, then of V, then of K."""


ABSENT = object()
"""An attribute that layers of a family do not have."""


class Rope(Enum):
    """How positions rotate queries and keys."""

    NONE = auto()
    HALF = auto()
    """Feature i is paired with feature i + R / 2; the model gives cosines and sines ``[.., R]``."""

    INTERLEAVED = auto()
    """Feature 2 i is paired with 2 i + 1; the second half of cosines and sines ``[.., R]`` repeats the first."""

    TWICE = auto()
    """As INTERLEAVED, with every value of the cosines and sines repeated next to itself."""

    SINES = auto()
    """As INTERLEAVED; the model gives sines, then cosines, ``[.., R / 2]``."""

    TABLE = auto()
    """As INTERLEAVED, with sines and cosines ``[positions, R]`` in the buffer `embed_positions` of the attention."""


class Residual(Enum):
    """The order of norms and residual additions in a layer."""

    SEQUENTIAL = auto()
    """``h = x + attention(norm(x)); h + mlp(norm(h))``"""

    PARALLEL = auto()
    """``x + attention(norm(x)) + mlp(norm(x))``, with one norm or two"""

    POST_NORM = auto()
    """``h = norm(x + attention(x)); norm(h + mlp(h))``"""

    NORMED = auto()
    """``n = norm(x); m = norm(n + attention(n)); m + mlp(m)``"""

    SANDWICH = auto()
    """``h = x + after(attention(norm(x))); h + after(mlp(norm(h)))``"""


@dataclass(frozen=True)
class Attention:
    """Names of the parts of an attention module, which is the attribute `module` of its layer."""

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
    """Attribute with the limit to which queries, keys and values are clamped; "" for none."""

    alibi: bool = False
    """Scores fall linearly with the distance, with a slope for each head (`alibi_slopes`)."""

    position_bias: bool = False
    """A `position_bias`, an argument of the layer or computed by the module, is added to the scores."""

    scale: str = "scaling"
    """Attribute with the factor of the scores; modules without it use ``head_size ** -0.5``."""

    softcap: str = ""
    """Attribute with the soft cap c of the scores, ``c * tanh(score / c)``; "" for none."""

    head_size: str = "head_dim"
    index: str = "layer_idx"


@dataclass(frozen=True)
class Mlp:
    """Names of the parts of an MLP, which is the attribute `module` of its layer, or with "" the layer itself."""

    module: str = "mlp"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Gate and up, both in one layer, or the only linear before the activation."""

    output: str = "down_proj"
    activation: str = "act_fn"
    gated: bool = True


@dataclass(frozen=True)
class Family:
    """How one class of decoder layers computes.

    - `norms` names the norms of attention and MLP, or the one that they share. SANDWICH adds the names of the norms
      after both; there "" stands for no norm, and an attribute that is a number multiplies.
    - `mlp` None calls the layer's own `mlp`.
    - `cross` is attention to an encoder, and `cross_norm` its norm; SEQUENTIAL and POST_NORM layers have it before the
      MLP.
    - `masked_is_true`: a bool mask is true where a query does not see a key.
    - `keywords` are further arguments that the layer may get, beside those that layers of all families may get.
    - `returns` names the attributes of `LayerCall` that the layer returns after the hidden states.
    - `clamps_float16`: the layer clamps float16; the stock layer runs for it.
    - `requires` maps attributes of the layer to required values, or `ABSENT`; layers with other values stay stock.
    """

    attention: Attention = Attention()
    mlp: Mlp | None = Mlp()
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    residual: Residual = Residual.SEQUENTIAL
    cross: Attention | None = None
    cross_norm: str = ""
    masked_is_true: bool = False
    keywords: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    clamps_float16: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> tuple[str, ...]:
        """Paths of the linear layers and of a stock MLP; a fused layer calls these modules if they are replaced."""
        paths = ["mlp"] if self.mlp is None else [f"{self.mlp.module}.{x}" for x in (*self.mlp.inputs, self.mlp.output)]
        for attention in filter(None, (self.attention, self.cross)):
            paths += [f"{attention.module}.{name}" for name in (*attention.projections, attention.output)]
        return tuple(path.lstrip(".") for path in paths)


_LLAMA = Family()
_QWEN3_ATTENTION = Attention(norms=("q_norm", "k_norm"))
_JOINT_NORMS = replace(_QWEN3_ATTENTION, joint_norms=True)
_GATE_UP = Mlp(inputs=("gate_up_proj",), activation="activation_fn")
_GEMMA2 = Family(
    Attention(softcap="attn_logit_softcapping"),
    norms=(
        "input_layernorm",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    residual=Residual.SANDWICH,
)
_OLMO2 = Family(
    _JOINT_NORMS,
    norms=("", "", "post_attention_layernorm", "post_feedforward_layernorm"),
    residual=Residual.SANDWICH,
)
_GRANITE = Family(
    norms=("input_layernorm", "post_attention_layernorm", "residual_multiplier", "residual_multiplier"),
    residual=Residual.SANDWICH,
)
_PHI = Family(
    Attention(output="dense"),
    Mlp("mlp", ("fc1",), "fc2", "activation_fn", gated=False),
    norms=("input_layernorm",),
    residual=Residual.PARALLEL,
    requires={"self_attn.qk_layernorm": False},
)
_PHI_NORMED = replace(
    _PHI,
    attention=replace(_PHI.attention, norms=("q_layernorm", "k_layernorm")),
    requires={"self_attn.qk_layernorm": True},
)
_NEOX = Family(
    Attention("attention", ("query_key_value",), "dense", Layout.GROUPS, head_size="head_size"),
    Mlp("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "act", gated=False),
    requires={"use_parallel_residual": False},
)
_GPTJ = Family(
    Attention("attn", output="out_proj", rope=Rope.SINES),
    Mlp("mlp", ("fc_in",), "fc_out", "act", gated=False),
    norms=("ln_1",),
    residual=Residual.PARALLEL,
    requires={"attn.embed_positions": ABSENT},
)
_GPTJ_TABLE = replace(  # transformers before 5.24
    _GPTJ,
    attention=replace(_GPTJ.attention, rope=Rope.TABLE),
    returns=("attention_weights",),
    requires={},
)
_CODEGEN = Attention("attn", ("qkv_proj",), "out_proj", Layout.QUARTERS, Rope.SINES)
_OPT = Family(
    Attention(output="out_proj", rope=Rope.NONE),
    Mlp("", ("fc1",), "fc2", "activation_fn", gated=False),
    ("self_attn_layer_norm", "final_layer_norm"),
    requires={"do_layer_norm_before": True},
)
_BLOOM = Family(
    Attention("self_attention", ("query_key_value",), "dense", Layout.GROUPS, Rope.NONE, alibi=True),
    Mlp("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "gelu_impl", gated=False),
    keywords=("alibi",),
    returns=("attention_weights",),
    requires={"apply_residual_connection_post_layernorm": False, "self_attention.slow_but_exact": False},
)
_BLOOM_NORMED = replace(
    _BLOOM,
    residual=Residual.NORMED,
    requires={**_BLOOM.requires, "apply_residual_connection_post_layernorm": True},
)
_MPT = Family(
    Attention(
        "attn", ("Wqkv",), "out_proj", Layout.BLOCKS, Rope.NONE, alibi=True, clip="clip_qkv", scale="softmax_scale"
    ),
    Mlp("ffn", ("up_proj",), "down_proj", "act", gated=False),
    ("norm_1", "norm_2"),
    masked_is_true=True,
    keywords=("position_bias",),
    returns=("attention_weights",),
)
_GPT_BIGCODE = Family(
    Attention("attn", ("c_attn",), "c_proj", Layout.BLOCKS, Rope.NONE),
    Mlp("mlp", ("c_fc",), "c_proj", "act", gated=False),
    ("ln_1", "ln_2"),
    keywords=("encoder_attention_mask",),
    requires={"attn.multi_query": True, "crossattention": None},
)
_GPT_BIGCODE_MULTI_HEAD = replace(
    _GPT_BIGCODE,
    attention=replace(_GPT_BIGCODE.attention, layout=Layout.GROUPS),
    requires={"attn.multi_query": False, "crossattention": None},
)
_GPT2 = replace(
    _GPT_BIGCODE,
    requires={"crossattention": None},
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
_BART = replace(_WHISPER, residual=Residual.POST_NORM)
_BART_DECODER = replace(_WHISPER_DECODER, residual=Residual.POST_NORM)


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


def _stablelm() -> tuple[Family, ...]:
    """With norms of the heads or without, one part after the other or both at once."""
    residuals = {
        False: (("input_layernorm", "post_attention_layernorm"), Residual.SEQUENTIAL),
        True: (("input_layernorm",), Residual.PARALLEL),
    }
    return tuple(
        Family(
            Attention(norms=("q_layernorm.norms", "k_layernorm.norms") if normed else ()),
            norms=norms,
            residual=residual,
            requires={"self_attn.qk_layernorm": normed, "use_parallel_residual": parallel},
        )
        for normed in (False, True)
        for parallel, (norms, residual) in residuals.items()
    )


def _cohere() -> tuple[Family, ...]:
    """With norms of the heads or without."""
    plain = Family(
        Attention(rope=Rope.TWICE),
        norms=("input_layernorm",),
        residual=Residual.PARALLEL,
        requires={"self_attn.use_qk_norm": False},
    )
    normed = replace(plain.attention, norms=("q_norm", "k_norm"))
    return plain, replace(plain, attention=normed, requires={"self_attn.use_qk_norm": True})


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
            Attention("self_attention", ("query_key_value",), "dense", Layout.GROUPS, rope),
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
    "PhiDecoderLayer": (_PHI, _PHI_NORMED),
    "StableLmDecoderLayer": _stablelm(),
    "GPTNeoXLayer": (
        _NEOX,
        replace(_NEOX, residual=Residual.PARALLEL, requires={"use_parallel_residual": True}),
    ),
    "GPTJBlock": (_GPTJ, _GPTJ_TABLE),
    "CodeGenBlock": (
        replace(_GPTJ, attention=_CODEGEN),
        replace(_GPTJ_TABLE, attention=replace(_CODEGEN, rope=Rope.TABLE)),
    ),
    "OPTDecoderLayer": (
        _OPT,
        replace(_OPT, residual=Residual.POST_NORM, requires={"do_layer_norm_before": False}),
    ),
    "FalconDecoderLayer": _falcon(),
    "BloomBlock": (_BLOOM, _BLOOM_NORMED),
    "MptBlock": (_MPT,),
    "GPTBigCodeBlock": (_GPT_BIGCODE, _GPT_BIGCODE_MULTI_HEAD),
    "GPT2Block": (_GPT2,),
    "GitLayer": (_GIT,),
    "T5Block": _t5(),
    "MT5Block": _t5(),
    "WhisperEncoderLayer": (_WHISPER,),
    "WhisperDecoderLayer": (_WHISPER_DECODER,),
    "MBartEncoderLayer": (_WHISPER,),
    "MBartDecoderLayer": (_WHISPER_DECODER,),
    "M2M100EncoderLayer": (_WHISPER,),
    "M2M100DecoderLayer": (_WHISPER_DECODER,),
    "PegasusEncoderLayer": (_WHISPER,),
    "PegasusDecoderLayer": (_WHISPER_DECODER,),
    "BartEncoderLayer": (_BART,),
    "BartDecoderLayer": (_BART_DECODER,),
    "MarianEncoderLayer": (_BART,),
    "MarianDecoderLayer": (_BART_DECODER,),
    "Gemma2DecoderLayer": (_GEMMA2,),
    "Gemma3DecoderLayer": (replace(_GEMMA2, attention=_QWEN3_ATTENTION),),
    "Glm4DecoderLayer": (
        Family(
            Attention(rope=Rope.INTERLEAVED),
            _GATE_UP,
            ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
            Residual.SANDWICH,
        ),
    ),
    "Olmo2DecoderLayer": (_OLMO2,),
    "Olmo3DecoderLayer": (_OLMO2,),
    "OlmoeDecoderLayer": (Family(_JOINT_NORMS, mlp=None, requires={"self_attn.config.clip_qkv": None}),),
    "GraniteDecoderLayer": (_GRANITE,),
    "CohereDecoderLayer": _cohere(),
    "Cohere2DecoderLayer": (
        replace(_cohere()[0], attention=Attention(rope=Rope.NONE), requires={"self_attn.sliding_window": None}),
        replace(_cohere()[0], requires={}),
    ),
    "SmolLM3DecoderLayer": (
        Family(requires={"self_attn.use_rope": True}),
        Family(Attention(rope=Rope.NONE), requires={"self_attn.use_rope": False}),
    ),
    "Starcoder2DecoderLayer": (Family(mlp=Mlp("mlp", ("c_fc",), "c_proj", "act", gated=False)),),
    "Qwen2MoeDecoderLayer": (replace(_LLAMA, mlp=None),),
    "PhimoeDecoderLayer": (replace(_LLAMA, mlp=None),),
    "MinistralDecoderLayer": (_LLAMA,),
    "SeedOssDecoderLayer": (_LLAMA,),
    "HeliumDecoderLayer": (Family(Attention(rope=Rope.INTERLEAVED)),),
    "Ernie4_5DecoderLayer": (Family(Attention(rope=Rope.INTERLEAVED)),),
}
"""Descriptions by class name of a layer; the first one whose `requires` hold is used."""
