"""`gguf_config`: the transformers configuration of the model in a GGUF file, made of its metadata.

What a file does not state is the same in every model of its architecture that llama.cpp runs, or is told by the tensors
that are there. Source: llama.cpp's ``convert_hf_to_gguf.py`` and its graphs of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ...checkpoints import GgufFile
from ...reading import shown
from .rope import check_above_0, rope_parameters

Entries = dict[str, Any]

MAX_LAYERS = 10_000
"""Most layers; each makes modules before a tensor is looked for."""

_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
}
_RMS_NORM = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_PARTLY_ROTATED = ("minimax-m2", "nemotron", "phi3", "qwen35", "qwen35moe", "stablelm")
"""Architectures that may rotate a part of each head."""

_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


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
        config = AutoConfig.for_model(model_type, **entries)
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


def _sizes(file: GgufFile, *tables: Mapping[str, str], without: tuple[str, ...] = ()) -> Entries:
    """The sizes and numbers that `file` states; ValueError for those that are missing or absurd."""
    entries: Entries = {}
    for name, key in {k: v for table in (_SIZES, *tables) for k, v in table.items()}.items():
        if name in without:
            continue
        entries[name] = file.of_model(key, float if name.endswith(("eps", "epsilon")) else int)
        if not 0 < entries[name] < 1 << 31:
            raise ValueError(f"{file.path}: {file.architecture}.{key}: expected a size, got {entries[name]}")
    if entries.get("num_hidden_layers", 0) > MAX_LAYERS:
        raise ValueError(f"{file.path}: {file.architecture}.block_count: expected at most {MAX_LAYERS}")
    return entries


def _has(file: GgufFile, part: str) -> bool:
    """Whether the first layer, or a later one, has the tensor `part`."""
    return any(name.startswith("blk.") and name.split(".", 2)[-1] == part for name in file.tensors)


def _attention(file: GgufFile, *tables: Mapping[str, str], without: tuple[str, ...] = ()) -> Entries:
    """Sizes of a decoder with rotated heads, some of which may share keys and values."""
    entries = _sizes(file, *tables, without=without)
    entries["num_key_value_heads"] = file.of_model("attention.head_count_kv", int, entries["num_attention_heads"])
    size = file.of_model("attention.key_length", int, entries["hidden_size"] // entries["num_attention_heads"])
    if not 0 < size < 1 << 20:
        raise ValueError(f"{file.path}: {file.architecture}.attention.key_length: expected a size, got {size}")
    _check_heads(file, entries["num_attention_heads"], entries["num_key_value_heads"], size)
    used, experts = entries.get("num_experts_per_tok", 0), entries.get("num_experts", entries.get("num_local_experts"))
    if experts is not None and used > experts:
        raise ValueError(f"{file.path}: expert_used_count: expected at most {experts}, got {used}")
    entries["head_dim"] = size
    entries["rope_parameters"] = rope_parameters(file, size)
    return entries


def _check_heads(file: GgufFile, heads: int, groups: int, size: int) -> None:
    """ValueError unless `groups` of keys and values divide the heads, and heads are rotated as `file` may say."""
    if groups <= 0 or heads % groups:
        raise ValueError(f"{file.path}: attention.head_count_kv: expected a divisor of {heads} heads, got {groups}")
    rotated = file.of_model("rope.dimension_count", int, size)
    if rotated != size and (file.architecture not in _PARTLY_ROTATED or not 0 < rotated < size or rotated % 2):
        raise ValueError(f"{file.path}: rope.dimension_count: expected the {size} of a head, got {rotated}")


def _rotate_partly(file: GgufFile, entries: Entries, size: int) -> int:
    """How many of the `size` values of a head are rotated; enters their part of it into the rope parameters."""
    rotated = file.of_model("rope.dimension_count", int, size)
    entries["rope_parameters"]["partial_rotary_factor"] = rotated / size
    return rotated


def query_scalar(model_type: str, sizes: Entries) -> int:
    """`query_pre_attn_scalar` of Gemma 2 and 3: the size of a head, in the largest of each the hidden size per head."""
    if sizes["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[model_type]:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _llama(file: GgufFile) -> Entries:
    if file.of_model("expert_count", int, 0):
        experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
        return {"model_type": "mixtral", "sliding_window": None, **_attention(file, _RMS_NORM, experts)}
    biases = {"attention_bias": _has(file, "attn_q.bias"), "mlp_bias": _has(file, "ffn_up.bias")}
    return {"model_type": "llama", **biases, **_attention(file, _RMS_NORM)}


def _qwen2(file: GgufFile) -> Entries:
    return {"model_type": "qwen2", "use_sliding_window": False, **_attention(file, _RMS_NORM)}


def _qwen3(file: GgufFile) -> Entries:
    return {"model_type": "qwen3", "use_sliding_window": False, **_attention(file, _RMS_NORM)}


def _qwen2_moe(file: GgufFile) -> Entries:
    shared = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    return {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "qkv_bias": _has(file, "attn_q.bias"),
        **_attention(file, _RMS_NORM, _EXPERTS, shared),
    }


def _qwen3_moe(file: GgufFile) -> Entries:
    return {"model_type": "qwen3_moe", "norm_topk_prob": True, **_attention(file, _RMS_NORM, _EXPERTS)}


def _gpt_oss(file: GgufFile) -> Entries:
    tables = {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    }
    return {"model_type": "gpt_oss", **_attention(file, _RMS_NORM, tables)}


def _minimax(file: GgufFile) -> Entries:
    tables = {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
    }
    entries = _attention(file, _RMS_NORM, tables)
    rotated = _rotate_partly(file, entries, entries["head_dim"])
    return {"model_type": "minimax_m2", "rotary_dim": rotated, **entries}


def _gemma(file: GgufFile) -> Entries:
    return {"model_type": "gemma", **_attention(file, _RMS_NORM)}


def _gemma2(file: GgufFile) -> Entries:
    entries = _attention(file, _RMS_NORM, {"sliding_window": "attention.sliding_window"})
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
    entries = _attention(file, _RMS_NORM, {"sliding_window": "attention.sliding_window"})
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
    entries = _attention(file, _RMS_NORM)
    size = entries.pop("head_dim")
    rotated = _rotate_partly(file, entries, size)
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
    entries = _attention(file, {"norm_epsilon": "attention.layer_norm_epsilon"})
    return {"model_type": "starcoder2", "use_bias": _has(file, "attn_q.bias"), **entries}


def _stablelm(file: GgufFile) -> Entries:
    entries = _attention(file, {"layer_norm_eps": "attention.layer_norm_epsilon"})
    size = entries.pop("head_dim")
    rotated = _rotate_partly(file, entries, size)
    return {
        "model_type": "stablelm",
        "use_qkv_bias": _has(file, "attn_q.bias"),
        "use_parallel_residual": not _has(file, "ffn_norm.weight"),
        "partial_rotary_factor": rotated / size,
        **entries,
    }


def _nemotron(file: GgufFile) -> Entries:
    entries = _attention(file, {"norm_eps": "attention.layer_norm_epsilon"})
    rotated = _rotate_partly(file, entries, entries["head_dim"])
    biases = {"attention_bias": _has(file, "attn_q.bias"), "mlp_bias": _has(file, "ffn_up.bias")}
    return {"model_type": "nemotron", "partial_rotary_factor": rotated / entries["head_dim"], **biases, **entries}


def _falcon(file: GgufFile) -> Entries:
    entries = _attention(file, {"layer_norm_epsilon": "attention.layer_norm_epsilon"}, without=("intermediate_size",))
    groups = entries.pop("num_key_value_heads")
    del entries["head_dim"]
    width = file.of_model("feed_forward_length", int, 4 * entries["hidden_size"])
    new = _has(file, "attn_norm_2.weight")
    return {
        "model_type": "falcon",
        "num_kv_heads": groups,
        "multi_query": groups == 1 and not new,
        "new_decoder_architecture": new or groups not in (1, entries["num_attention_heads"]),
        "num_ln_in_parallel_attn": 2 if new else 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": _has(file, "attn_qkv.bias"),
        "ffn_hidden_size": width,
        **entries,
    }


def _gpt2(file: GgufFile) -> Entries:
    sizes = _sizes(file, {"layer_norm_epsilon": "attention.layer_norm_epsilon"})
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
    sizes = _sizes(file, names, without=("max_position_embeddings", "intermediate_size"))
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
    sizes = _sizes(file, names, without=("num_attention_heads", "max_position_embeddings"))
    if sizes["intermediate_size"] % sizes["hidden_size"]:
        raise ValueError(f"{file.path}: mamba.ssm.inner_size: expected a multiple of mamba.embedding_length")
    return {
        "model_type": "mamba",
        "expand": sizes.pop("intermediate_size") // sizes["hidden_size"],
        "use_bias": _has(file, "ssm_in.bias"),
        "use_conv_bias": _has(file, "ssm_conv1d.bias"),
        **sizes,
    }


def _lfm2(file: GgufFile) -> Entries:
    heads = file.of_model("attention.head_count_kv", list)
    if not heads or not all(type(each) is int and 0 <= each < 1 << 16 for each in heads) or not any(heads):
        raise ValueError(f"{file.path}: lfm2.attention.head_count_kv: expected the heads of each layer")
    names = {"conv_L_cache": "shortconv.l_cache", "norm_eps": "attention.layer_norm_rms_epsilon"}
    sizes = _sizes(file, names)
    _check_heads(file, sizes["num_attention_heads"], max(heads), sizes["hidden_size"] // sizes["num_attention_heads"])
    return {
        "model_type": "lfm2",
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": _has(file, "shortconv.in_proj.bias"),
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
        names |= _EXPERTS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    entries = _attention(file, _RMS_NORM, names, without=("intermediate_size",) if experts else ())
    further = file.of_model("nextn_predict_layers", int, 0)
    if not 0 <= further < entries["num_hidden_layers"]:
        raise ValueError(f"{file.path}: nextn_predict_layers: expected fewer than all layers, got {further}")
    entries["num_hidden_layers"] -= further
    inner, heads = entries.pop("inner"), entries["linear_num_value_heads"]
    if inner % heads:
        raise ValueError(f"{file.path}: {file.architecture}.ssm.inner_size: expected {heads} heads, got {inner}")
    rotated = _rotate_partly(file, entries, entries["head_dim"])
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
    sizes = _sizes(file, names, without=tuple(_SIZES))
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
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
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
