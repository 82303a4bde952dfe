"""Metadata and names that a GGUF file of a model has, for the architectures that `ARCHITECTURES` lists.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and ``gguf-py``'s ``constants.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...reading import shown


@dataclass(frozen=True)
class Architecture:
    """An architecture by its `name` in GGUF; `pairs` says that the halves of a rotated head become pairs of rows."""

    name: str
    pairs: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", pairs=True),
    "mistral": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
"""Architectures by `model_type`."""

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")

_PATTERNS = (
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|", "llama-bpe"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|", "qwen2"),
)
"""Beginnings of the expressions that divide a text, and the names that llama.cpp has for the whole of them."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model; ValueError for one that is not written, or that rotates heads in another way."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ValueError(
            f"format: GGUF is written of {', '.join(ARCHITECTURES)} models, got a {config.model_type}; write another "
            "format"
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type: GGUF is written of the default one, got {shown(rope['rope_type'])}")
    for option in ("sliding_window", "mlp_bias"):
        if getattr(config, option, None):
            raise ValueError(f"{option}: GGUF is written of models without it, got {shown(getattr(config, option))}")
    return found


def gguf_name(name: str) -> str:
    """The name in the file of the linear layer, norm or embedding `name`; ValueError for one that has none."""
    found = _LAYER.match(name)
    part = _INNER.get(found[2]) if found else _OUTER.get(name)
    if part is None:
        raise ValueError(f"{name}: GGUF has no place for it; write another format")
    return f"blk.{found[1]}.{part}" if found else part


def row_order(name: str, config: PreTrainedConfig, rows: int) -> torch.Tensor | None:
    """The row of the layer `name` at each row of the file; None if they are the same."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None or not ARCHITECTURES[config.model_type].pairs:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def model_metadata(config: PreTrainedConfig, file_type: int) -> dict[str, Any]:
    """Metadata of the model itself; values that GGUF has no key for are those of its architecture."""
    name = ARCHITECTURES[config.model_type].name
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float((config.rope_parameters or {}).get("rope_theta", 10000.0)),
    }
    general = {"general.architecture": name, "general.file_type": file_type, "general.quantization_version": 2}
    return general | {f"{name}.{key}": value for key, value in own.items()}


def tokenizer_metadata(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """Metadata of a byte-level BPE `tokenizer`, with names for unused numbers below `vocabulary`.

    Without a tokenizer the file says that it has none. Raises ValueError for tokenizers of another kind, or that divide
    texts in a way that llama.cpp has no name for.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    bytewise = "ByteLevel" in json.dumps(content.get("decoder")) and not model.get("byte_fallback")
    if model.get("type") != "BPE" or not bytewise:
        raise ValueError("tokenizer: GGUF is written with byte-level BPE; leave the tokenizer out")
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if max(tokens) >= vocabulary:
        raise ValueError(f"tokenizer: it has the token {max(tokens)}, the model {vocabulary} tokens")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(content.get("pre_tokenizer")),
        "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(vocabulary)],
        "tokenizer.ggml.token_type": [kinds.get(number, _USER_DEFINED) for number in range(vocabulary)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
    }
    for key, number in (
        ("bos_token_id", tokenizer.bos_token_id),
        ("eos_token_id", tokenizer.eos_token_id),
        ("unknown_token_id", tokenizer.unk_token_id),
        ("padding_token_id", tokenizer.pad_token_id),
    ):
        if number is not None:
            metadata[f"tokenizer.ggml.{key}"] = number
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _pre_tokenizer(content: Any) -> str:
    """llama.cpp's name for how a tokenizer divides texts; ValueError for a way without one."""
    parts = content.get("pretokenizers", [content]) if isinstance(content, dict) else []
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = (parts[0].get("pattern") or {}).get("Regex", "")
        for start, name in _PATTERNS:
            if pattern.startswith(start):
                return name
    raise ValueError("tokenizer: llama.cpp has no name for how it divides texts; leave the tokenizer out")
