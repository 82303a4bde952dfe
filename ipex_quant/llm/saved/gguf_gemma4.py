"""Metadata of GGUF files of Gemma 4, whose layers with a window and without differ in their heads.

Source: llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from ...reading import shown

GEMMA4 = "gemma4_text"
"""`model_type` of the text model."""

_UNROTATED = 1e30
"""Divisor of the frequency of a pair that is not rotated."""


def gemma4_metadata(config: PreTrainedConfig) -> dict[str, Any]:
    """What layers have, in an entry for all where it is the same; ValueError for scaled positions."""
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    layers = list(config.per_layer_config)
    rope = {kind: config.rope_parameters[kind] for kind in sorted({*config.layer_types})}
    for kind, own in rope.items():
        usual = {"rope_type": "proportional" if kind == "full_attention" else "default", "factor": 1.0}
        other = {key: value for key, value in own.items() if key not in _KEYS and value != usual.get(key)}
        if other or own["rope_type"] != usual["rope_type"]:
            raise ValueError(f"rope_parameters: GGUF is written of positions that are not scaled, got {shown(own)}")
    entries: dict[str, Any] = {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": windows,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
    }
    for end, window, kind in (("", False, "full_attention"), ("_swa", True, "sliding_attention")):
        if window in windows:
            size = layers[windows.index(window)].head_dim
            keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
            entries |= {f"{key}{end}": size for key in keys}
            entries[f"rope.freq_base{end}"] = float(rope[kind]["rope_theta"])
    first = config.num_hidden_layers - config.num_kv_shared_layers
    width = config.intermediate_size
    if config.use_double_wide_mlp:
        entries["feed_forward_length"] = [width * (1 + (layer >= first)) for layer in range(config.num_hidden_layers)]
    else:
        entries["feed_forward_length"] = width
    if config.final_logit_softcapping:
        entries["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.enable_moe_block:
        entries |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return entries


_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor")


def gemma4_divisors(config: PreTrainedConfig) -> torch.Tensor:
    """Divisors of the frequencies of layers without a window, float32: only the first pairs are rotated."""
    size = config.per_layer_config["full_attention"].head_dim
    part = config.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0)
    divisors = torch.full((size // 2,), _UNROTATED)
    divisors[: int(part * size // 2)] = 1.0
    return divisors
