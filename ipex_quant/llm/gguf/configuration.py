"""`gguf_config`: the transformers configuration of the model in a GGUF file, made of its metadata.

What a file does not state is the same in every model of its architecture that llama.cpp runs, or is told by the tensors
that are there. Source: llama.cpp's ``convert_hf_to_gguf.py`` and its graphs of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ...checkpoints import GgufFile
from ...reading import shown
from .deci import DeciConfig, deci_entries
from .gemma4 import gemma4_entries
from .metadata import (
    EXPERTS,
    MAX_LAYERS,
    RMS_NORM,
    SIZES,
    Entries,
    attention_sizes,
    check_heads,
    has_part,
    rotate_partly,
    sizes_of,
)
from .rope import check_above_0, rope_parameters

_OWN: Mapping[str, type[PreTrainedConfig]] = {DeciConfig.model_type: DeciConfig}
"""Configurations of models that transformers has not."""


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The configuration of the model in `file`, with its class in `architectures`.

    Raises ValueError for entries that are missing, of another type or absurd, and architectures that are not read.
    """
    make = _MAKERS.get(file.architecture)
    if make is None:
        raise ValueError(
            f"{file.path}: general.architecture: expected one of {', '.join(_MAKERS)}, got {file.architecture[:100]!r}"
        )
    entries = {**_common(file), **make(file)}
    model_type = entries.pop("model_type")
    name = entries.pop("class", None) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    name = name or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    try:
        own = _OWN.get(model_type)
        config = AutoConfig.for_model(model_type, **entries) if own is None else own(**entries)
    except Exception as error:  # classes of its own, of which not all are ValueErrors
        raise ValueError(f"{file.path}: its metadata make no configuration of a {model_type} ({error})") from error
    config.architectures = [name]
    return config


def _common(file: GgufFile) -> Entries:
    """Vocabulary, special tokens, and whether the output layer is the embedding."""
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ValueError(f"{file.path}: token_embd.weight: missing; get a complete file")
    entries: Entries = {"vocab_size": table.stored.shape[0], "tie_word_embeddings": "output.weight" not in file.tensors}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.expect(f"tokenizer.ggml.{key}_token_id", int, -1)
        entries[f"{name}_token_id"] = token if 0 <= token < table.stored.shape[0] else None
    return entries


def query_scalar(model_type: str, sizes: Entries) -> int:
    """`query_pre_attn_scalar` of Gemma 2 and 3: the size of a head, in the largest of each the hidden size per head."""
    if sizes["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[model_type]:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _llama(file: GgufFile) -> Entries:
    if file.of_model("expert_count", int, 0):
        experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
        return {"model_type": "mixtral", "sliding_window": None, **attention_sizes(file, RMS_NORM, experts)}
    biases = {"attention_bias": has_part(file, "attn_q.bias"), "mlp_bias": has_part(file, "ffn_up.bias")}
    return {"model_type": "llama", **biases, **attention_sizes(file, RMS_NORM)}


def _qwen2(file: GgufFile) -> Entries:
    return {"model_type": "qwen2", "use_sliding_window": False, **attention_sizes(file, RMS_NORM)}


def _qwen3(file: GgufFile) -> Entries:
    return {"model_type": "qwen3", "use_sliding_window": False, **attention_sizes(file, RMS_NORM)}


def _qwen2_moe(file: GgufFile) -> Entries:
    shared = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    return {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "qkv_bias": has_part(file, "attn_q.bias"),
        **attention_sizes(file, RMS_NORM, EXPERTS, shared),
    }


def _qwen3_moe(file: GgufFile) -> Entries:
    return {"model_type": "qwen3_moe", "norm_topk_prob": True, **attention_sizes(file, RMS_NORM, EXPERTS)}


def _gpt_oss(file: GgufFile) -> Entries:
    tables = {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    }
    entries = attention_sizes(file, RMS_NORM, tables)
    if entries["rope_parameters"]["rope_type"] == "yarn":
        entries["rope_parameters"]["truncate"] = False  # as published, whatever llama.cpp does
    return {"model_type": "gpt_oss", **entries}


def _minimax(file: GgufFile) -> Entries:
    tables = {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
    }
    entries = attention_sizes(file, RMS_NORM, tables)
    rotated = rotate_partly(file, entries, entries["head_dim"])
    return {"model_type": "minimax_m2", "rotary_dim": rotated, **entries}


def _gemma(file: GgufFile) -> Entries:
    return {"model_type": "gemma", **attention_sizes(file, RMS_NORM)}


def _gemma2(file: GgufFile) -> Entries:
    entries = attention_sizes(file, RMS_NORM, {"sliding_window": "attention.sliding_window"})
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    caps = {key: file.of_model(key, float, default) for key, default in caps.items()}
    for key, cap in caps.items():
        check_above_0(file, key, cap)
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": query_scalar("gemma2", entries),
        **caps,
        **entries,
    }


def _gemma3(file: GgufFile) -> Entries:
    entries = attention_sizes(file, RMS_NORM, {"sliding_window": "attention.sliding_window"})
    rotated = entries.pop("rope_parameters")
    local = file.of_model("rope.freq_base_swa", float, 10_000.0)
    check_above_0(file, "rope.freq_base_swa", local)
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": query_scalar("gemma3_text", entries),
        "rope_parameters": {
            "full_attention": rotated,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        **entries,
    }


def _phi3(file: GgufFile) -> Entries:
    entries = attention_sizes(file, RMS_NORM)
    size = entries.pop("head_dim")
    rotated = rotate_partly(file, entries, size)
    original = file.of_model("rope.scaling.original_context_length", int, entries["max_position_embeddings"])
    window = file.of_model("attention.sliding_window", int, 0)
    if window < 0:
        raise ValueError(f"{file.path}: phi3.attention.sliding_window: expected a size, got {window}")
    return {
        "model_type": "phi3",
        "partial_rotary_factor": rotated / size,
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
        **entries,
    }


def _starcoder2(file: GgufFile) -> Entries:
    entries = attention_sizes(file, {"norm_epsilon": "attention.layer_norm_epsilon"})
    return {"model_type": "starcoder2", "use_bias": has_part(file, "attn_q.bias"), **entries}


def _stablelm(file: GgufFile) -> Entries:
    entries = attention_sizes(file, {"layer_norm_eps": "attention.layer_norm_epsilon"})
    size = entries.pop("head_dim")
    rotated = rotate_partly(file, entries, size)
    return {
        "model_type": "stablelm",
        "use_qkv_bias": has_part(file, "attn_q.bias"),
        "use_parallel_residual": not has_part(file, "ffn_norm.weight"),
        "partial_rotary_factor": rotated / size,
        **entries,
    }


def _nemotron(file: GgufFile) -> Entries:
    entries = attention_sizes(file, {"norm_eps": "attention.layer_norm_epsilon"})
    rotated = rotate_partly(file, entries, entries["head_dim"])
    biases = {"attention_bias": has_part(file, "attn_q.bias"), "mlp_bias": has_part(file, "ffn_up.bias")}
    return {"model_type": "nemotron", "partial_rotary_factor": rotated / entries["head_dim"], **biases, **entries}


def _falcon(file: GgufFile) -> Entries:
    entries = attention_sizes(
        file, {"layer_norm_epsilon": "attention.layer_norm_epsilon"}, without=("intermediate_size",)
    )
    groups = entries.pop("num_key_value_heads")
    del entries["head_dim"]
    width = file.of_model("feed_forward_length", int, 4 * entries["hidden_size"])
    new = has_part(file, "attn_norm_2.weight")
    return {
        "model_type": "falcon",
        "num_kv_heads": groups,
        "multi_query": groups == 1 and not new,
        "new_decoder_architecture": new or groups not in (1, entries["num_attention_heads"]),
        "num_ln_in_parallel_attn": 2 if new else 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": has_part(file, "attn_qkv.bias"),
        "ffn_hidden_size": width,
        **entries,
    }


def _gpt2(file: GgufFile) -> Entries:
    sizes = sizes_of(file, {"layer_norm_epsilon": "attention.layer_norm_epsilon"})
    return {
        "model_type": "gpt2",
        "n_embd": sizes["hidden_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": sizes["num_attention_heads"],
        "n_positions": sizes["max_position_embeddings"],
        "n_inner": sizes["intermediate_size"],
        "layer_norm_epsilon": sizes["layer_norm_epsilon"],
    }


def _bloom(file: GgufFile) -> Entries:
    names = {"layer_norm_epsilon": "attention.layer_norm_epsilon"}
    sizes = sizes_of(file, names, without=("max_position_embeddings", "intermediate_size"))
    return {
        "model_type": "bloom",
        "hidden_size": sizes["hidden_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": sizes["num_attention_heads"],
        "layer_norm_epsilon": sizes["layer_norm_epsilon"],
    }


def _mamba(file: GgufFile) -> Entries:
    names = {
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "intermediate_size": "ssm.inner_size",
        "conv_kernel": "ssm.conv_kernel",
        "state_size": "ssm.state_size",
        "time_step_rank": "ssm.time_step_rank",
    }
    sizes = sizes_of(file, names, without=("num_attention_heads", "max_position_embeddings"))
    if sizes["intermediate_size"] % sizes["hidden_size"]:
        raise ValueError(f"{file.path}: mamba.ssm.inner_size: expected a multiple of mamba.embedding_length")
    return {
        "model_type": "mamba",
        "expand": sizes.pop("intermediate_size") // sizes["hidden_size"],
        "use_bias": has_part(file, "ssm_in.bias"),
        "use_conv_bias": has_part(file, "ssm_conv1d.bias"),
        **sizes,
    }


def _lfm2(file: GgufFile) -> Entries:
    heads = file.of_model("attention.head_count_kv", list)
    if not heads or not all(type(each) is int and 0 <= each < 1 << 16 for each in heads) or not any(heads):
        raise ValueError(f"{file.path}: lfm2.attention.head_count_kv: expected the heads of each layer")
    names = {"conv_L_cache": "shortconv.l_cache", "norm_eps": "attention.layer_norm_rms_epsilon"}
    sizes = sizes_of(file, names)
    check_heads(file, sizes["num_attention_heads"], max(heads), sizes["hidden_size"] // sizes["num_attention_heads"])
    return {
        "model_type": "lfm2",
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": has_part(file, "shortconv.in_proj.bias"),
        "rope_parameters": rope_parameters(file, 0),
        **sizes,
    }


def _qwen35(file: GgufFile) -> Entries:
    names = {
        "full_attention_interval": "full_attention_interval",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
        "inner": "ssm.inner_size",
    }
    experts = file.architecture == "qwen35moe"
    if experts:
        names |= EXPERTS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    entries = attention_sizes(file, RMS_NORM, names, without=("intermediate_size",) if experts else ())
    further = file.of_model("nextn_predict_layers", int, 0)
    if not 0 <= further < entries["num_hidden_layers"]:
        raise ValueError(f"{file.path}: nextn_predict_layers: expected fewer than all layers, got {further}")
    entries["num_hidden_layers"] -= further
    inner, heads = entries.pop("inner"), entries["linear_num_value_heads"]
    if inner % heads:
        raise ValueError(f"{file.path}: {file.architecture}.ssm.inner_size: expected {heads} heads, got {inner}")
    rotated = rotate_partly(file, entries, entries["head_dim"])
    sections = file.of_model("rope.dimension_sections", list, [])
    entries["rope_parameters"]["mrope_interleaved"] = True
    if not all(type(each) is int and 0 <= each <= rotated for each in sections):
        raise ValueError(f"{file.path}: rope.dimension_sections: expected sizes, got {shown(sections)}")
    if sections:
        entries["rope_parameters"]["mrope_section"] = [each for each in sections if each]
    kind = "qwen3_5_moe_text" if experts else "qwen3_5_text"
    return {"model_type": kind, "linear_value_head_dim": inner // heads, **entries}


def _t5(file: GgufFile) -> Entries:
    names = {
        "d_model": "embedding_length",
        "d_ff": "feed_forward_length",
        "d_kv": "attention.key_length",
        "num_heads": "attention.head_count",
        "num_layers": "block_count",
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "relative_attention_num_buckets": "attention.relative_buckets_count",
    }
    sizes = sizes_of(file, names, without=tuple(SIZES))
    own_bias = "dec.blk.1.attn_rel_b.weight" in file.tensors or "enc.blk.1.attn_rel_b.weight" in file.tensors
    decoder = file.of_model("decoder_block_count", int, sizes["num_layers"])
    if not (sizes["num_layers"] <= MAX_LAYERS and 0 < decoder <= MAX_LAYERS):
        raise ValueError(f"{file.path}: block_count, decoder_block_count: expected 1 to {MAX_LAYERS} layers")
    encoder = file.architecture == "t5encoder"
    kind = "umt5" if own_bias else "t5"
    gated = "gated-gelu" if "enc.blk.0.ffn_gate.weight" in file.tensors else "relu"
    return {
        "model_type": kind,
        "class": {"t5": "T5", "umt5": "UMT5"}[kind] + ("EncoderModel" if encoder else "ForConditionalGeneration"),
        "num_decoder_layers": decoder,
        "decoder_start_token_id": file.of_model("decoder_start_token_id", int, 0),
        "feed_forward_proj": gated,
        **sizes,
    }


_MAKERS: Mapping[str, Callable[[GgufFile], Entries]] = {
    "bloom": _bloom,
    "deci": deci_entries,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": gemma4_entries,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "lfm2": _lfm2,
    "llama": _llama,
    "mamba": _mamba,
    "minimax-m2": _minimax,
    "nemotron": _nemotron,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "t5": _t5,
    "t5encoder": _t5,
}
