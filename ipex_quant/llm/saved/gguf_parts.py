"""Metadata that a GGUF file of a model has, for the architectures that are written.

What llama.cpp knows of an architecture is no metadata: a model that differs there is refused. Source: llama.cpp's
``convert_hf_to_gguf.py`` and its graphs of the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...reading import shown
from ..gguf.configuration import query_scalar
from .gguf_gemma4 import GEMMA4, gemma4_divisors, gemma4_metadata

Entries = dict[str, Any]

_SILU, _GELU = "silu", "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Written:
    """How models of a type are written: the `name` of their architecture, and what llama.cpp takes for granted.

    `activation` is that of the MLP. Of every `period` layers the last attends to all, the others to a window; 0 is for
    models without windows, or whose metadata tell them, as `states_windows` says. `own_head` says that the output layer
    may be another than the embedding. `assumed` are
    entries of the configuration that are the same in all of these models. `entries` makes metadata beside the usual.
    """

    name: str
    activation: str = _SILU
    period: int = 0
    own_head: bool = True
    states_windows: bool = False
    assumed: Mapping[str, Any] = field(default_factory=dict)
    entries: Callable[[PreTrainedConfig], Entries] = lambda config: {}


def written_as(config: PreTrainedConfig) -> Written:
    """How the model is written; ValueError for one that is not, or that llama.cpp would compute otherwise."""
    found = WRITTEN.get(config.model_type)
    if found is None:
        raise ValueError(
            f"format: GGUF is written of {', '.join(WRITTEN)} models, got a {config.model_type}; write another format"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        raise ValueError(f"hidden_act: llama.cpp has {found.activation} in this model, got {shown(activation)}")
    if not found.period and not found.states_windows and getattr(config, "sliding_window", None):
        raise ValueError(f"sliding_window: GGUF is written of models without it, got {shown(config.sliding_window)}")
    if found.period:
        kinds = ["sliding_attention"] * (found.period - 1) + ["full_attention"]
        expected = [kinds[layer % found.period] for layer in range(config.num_hidden_layers)]
        if list(config.layer_types) != expected:
            raise ValueError(
                f"layer_types: llama.cpp has {found.period - 1} layers with a window before one without in this model, "
                f"got {shown(config.layer_types)}"
            )
    for key, expected in found.assumed.items():
        if getattr(config, key) != expected:
            raise ValueError(f"{key}: llama.cpp has {expected} in this model, got {shown(getattr(config, key))}")
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # of images, if at all
        raise ValueError("use_bidirectional_attention: GGUF is written of models without it")
    return found


def model_metadata(config: PreTrainedConfig) -> Entries:
    """Metadata of the model itself; ValueError as `written_as`, and for a scaling of positions that is not written."""
    written = written_as(config)
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **({} if config.model_type == GEMMA4 else _usual(config)),
        **written.entries(config),
    }
    general = {"general.architecture": written.name, "general.quantization_version": 2}
    return general | {f"{written.name}.{key}": value for key, value in own.items()}


def _usual(config: PreTrainedConfig) -> Entries:
    """Sizes of heads and of the MLP, and how positions are rotated, of models whose layers are alike."""
    size = _head_size(config)
    return {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        **_rope_metadata(config),
    }


def rope_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors of divisors of the frequencies that positions are rotated by, float32, by their names in the file."""
    if config.model_type == GEMMA4:
        return {"rope_freqs.weight": gemma4_divisors(config)}
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{part}.weight": torch.tensor(rope[f"{part}_factor"]) for part in ("long", "short")}
    if rope["rope_type"] != "llama3":
        return {}
    size = _head_size(config)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: PreTrainedConfig) -> Entries:
    """The `rope_parameters` of layers that attend to all; ValueError for those that are not written."""
    rope = dict(config.rope_parameters or {})
    rope = dict(rope.get("full_attention", rope))
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **{k: v for k, v in rope.items() if v is not None}}
    kind = rope["rope_type"]
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope_type: GGUF is written of {', '.join(_ROPE_KEYS)}, got {shown(kind)}")
    allowed = {"rope_type", "rope_theta", *_ROPE_KEYS[kind]}
    allowed |= _FURTHER_ROPE_KEYS.get(config.model_type, set())
    other = {key: value for key, value in rope.items() if key not in allowed}
    if other.get("partial_rotary_factor") == 1:
        del other["partial_rotary_factor"]
    if config.model_type == "gpt_oss" and rope.get("truncate", True):
        raise ValueError("rope_parameters: GGUF is written of gpt-oss with 'truncate' false, as it is published")
    if other:
        raise ValueError(f"rope_parameters: GGUF is written of {kind} without {sorted(other)}; write another format")
    return rope


_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "original_max_position_embeddings", "long_factor", "short_factor", "attention_factor"),
}
"""Keys of the kinds of scaling that are written."""


_FURTHER_ROPE_KEYS: Mapping[str, set[str]] = {
    "phi3": {"partial_rotary_factor", "original_max_position_embeddings"},
    "minimax_m2": {"partial_rotary_factor"},
    "gpt_oss": {"truncate"},
}
"""Keys that some models have besides, by `model_type`."""


def _rope_metadata(config: PreTrainedConfig) -> Entries:
    rope = _rope(config)
    rotated = int(_head_size(config) * rope.get("partial_rotary_factor", 1.0))
    entries: Entries = {"rope.dimension_count": rotated, "rope.freq_base": float(rope["rope_theta"])}
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        entries |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        betas = {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if key in rope}
        entries |= {"rope.scaling.original_context_length": original or config.max_position_embeddings, **betas}
    if kind == "longrope":
        original = original or config.original_max_position_embeddings
        factor = config.max_position_embeddings / original
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        entries |= {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(rope.get("attention_factor", usual)),
        }
    return entries


def _gemma(config: PreTrainedConfig) -> Entries:
    """Gemma 2 and 3: windows, soft caps, and how queries are scaled, which llama.cpp knows by the number of layers."""
    scalar = query_scalar(config.model_type, config.to_dict() | {"head_dim": _head_size(config)})
    if config.query_pre_attn_scalar != scalar:
        raise ValueError(
            f"query_pre_attn_scalar: llama.cpp has {scalar} in this model, got {config.query_pre_attn_scalar}"
        )
    entries: Entries = {"attention.sliding_window": config.sliding_window}
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    if config.model_type == "gemma2":
        missing = [cap for cap in caps if not getattr(config, cap)]
        if missing:
            raise ValueError(f"{missing[0]}: llama.cpp has a soft cap in this model, got none")
        return entries | {cap: float(getattr(config, cap)) for cap in caps}
    capped = [cap for cap in caps if getattr(config, cap, None)]
    if capped:
        raise ValueError(f"{capped[0]}: llama.cpp has none in this model, got {getattr(config, capped[0])}")
    local = config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type: GGUF is written of windows with the default one, got {shown(local['rope_type'])}")
    return entries | {"rope.freq_base_swa": float(local["rope_theta"])}


def _phi3(config: PreTrainedConfig) -> Entries:
    entries: Entries = {"rope.scaling.original_context_length": config.original_max_position_embeddings}
    return entries | ({"attention.sliding_window": config.sliding_window} if config.sliding_window else {})


def _experts(config: PreTrainedConfig) -> Entries:
    """Numbers and widths of experts, and of the one that all tokens share, where there is one."""
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        **({} if config.model_type == "mixtral" else {"expert_feed_forward_length": width}),
        **({} if shared is None else {"expert_shared_feed_forward_length": shared}),
    }


def _gpt_oss(config: PreTrainedConfig) -> Entries:
    return {**_experts(config), "attention.sliding_window": config.sliding_window}


def _minimax(config: PreTrainedConfig) -> Entries:
    return {**_experts(config), "expert_gating_func": _SIGMOID}


_SIGMOID = 2
_ALL_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
"""Entries of models whose every layer has experts."""

WRITTEN: Mapping[str, Written] = {
    "llama": Written("llama"),
    "mistral": Written("llama"),
    "qwen2": Written("qwen2"),
    "qwen3": Written("qwen3"),
    "phi3": Written("phi3", states_windows=True, entries=_phi3),
    "gemma": Written("gemma", _GELU, own_head=False),
    "gemma2": Written("gemma2", _GELU, 2, False, entries=_gemma),
    "gemma3_text": Written("gemma3", _GELU, 6, entries=_gemma),
    GEMMA4: Written("gemma4", _GELU, states_windows=True, assumed={"attention_bias": False}, entries=gemma4_metadata),
    "mixtral": Written("llama", entries=_experts),
    "qwen2_moe": Written("qwen2moe", assumed={"norm_topk_prob": False, **_ALL_EXPERTS}, entries=_experts),
    "qwen3_moe": Written("qwen3moe", assumed={"norm_topk_prob": True, **_ALL_EXPERTS}, entries=_experts),
    "gpt_oss": Written("gpt-oss", period=2, assumed={"swiglu_limit": 7.0, "swiglu_alpha": 1.702}, entries=_gpt_oss),
    "minimax_m2": Written("minimax-m2", entries=_minimax),
}
"""Models that are written, by `model_type`."""
