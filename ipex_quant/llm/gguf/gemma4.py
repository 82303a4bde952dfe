"""The configuration of Gemma 4, whose layers with a window and without differ in their heads."""

from __future__ import annotations

import torch

from ...checkpoints import GgufFile
from ...reading import shown
from .metadata import RMS_NORM, Entries, check_heads, of_layers, sizes_of
from .rope import check_above_0

_WINDOWS = {"head_dim": "attention.key_length_swa", "sliding_window": "attention.sliding_window"}
_EXPERTS = {
    "num_experts": "expert_count",
    "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_ENDS = ("<eos>", "<|tool_response>", "<turn|>")
"""Tokens that end a turn; files name the first alone."""

_UNROTATED = 1e20
"""Divisors of frequencies from here on stand for pairs that are not rotated."""


def gemma4_entries(file: GgufFile) -> Entries:
    """Entries of a ``gemma4_text`` configuration; ValueError for those that no such model has."""
    experts = file.of_model("expert_count", int, 0)
    entries = sizes_of(file, RMS_NORM, _WINDOWS, _EXPERTS if experts else {}, without=("intermediate_size",))
    if experts and entries["top_k_experts"] > experts:
        raise ValueError(f"{file.path}: expert_used_count: expected at most {experts}, got {entries['top_k_experts']}")
    layers, heads, size = entries["num_hidden_layers"], entries["num_attention_heads"], entries["head_dim"]
    windows = file.of_model("attention.sliding_window_pattern", list)
    if len(windows) != layers or not all(type(each) is bool for each in windows) or windows[-1]:
        raise ValueError(
            f"{file.path}: gemma4.attention.sliding_window_pattern: expected whether each of {layers} layers has a "
            f"window, the last has none, got {shown(windows)}"
        )
    shared = file.of_model("attention.shared_kv_layers", int, 0)
    if not 0 <= shared < layers:
        raise ValueError(f"{file.path}: gemma4.attention.shared_kv_layers: expected fewer than all, got {shared}")
    groups = _one_of_each(file, "attention.head_count_kv", of_layers(file, "attention.head_count_kv", heads), windows)
    full = file.of_model("attention.key_length")
    for own in groups.values():
        check_heads(file, heads, own, full)
    rotated = file.of_model("rope.dimension_count_swa", int, size)
    if not (0 < full < 1 << 20 and 0 < size < 1 << 20) or rotated != size:
        raise ValueError(f"{file.path}: expected whole heads to be rotated, got {rotated} of {size}, {full} in others")
    valued = [f"blk.{layer}.attn_v.weight" in file.tensors for layer in range(layers - shared) if not windows[layer]]
    if any(valued) and not all(valued):
        raise ValueError(f"{file.path}: expected attn_v in all layers without a window, or in none")
    width, double = _widths(file, layers, shared)
    further = file.of_model("embedding_length_per_layer_input", int, 0)
    if not 0 <= further < 1 << 31:
        raise ValueError(f"{file.path}: embedding_length_per_layer_input: expected a size, got {further}")
    table = file.tensors.get("per_layer_token_embd.weight", file.tensors["token_embd.weight"])
    cap = file.of_model("final_logit_softcapping", float, 0.0)
    last = {"head_dim": full, "num_key_value_heads": groups[False]}
    return entries | {
        "model_type": "gemma4_text",
        "eos_token_id": _ends(file),
        "num_key_value_heads": groups.get(True, groups[False]),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "per_layer_config": {layer: dict(last) for layer, window in enumerate(windows) if not window},
        "attention_k_eq_v": not any(valued),
        "num_kv_shared_layers": shared,
        "intermediate_size": width,
        "use_double_wide_mlp": double,
        "enable_moe_block": bool(experts),
        "hidden_size_per_layer_input": further,
        "vocab_size_per_layer_input": table.stored.shape[0],
        "final_logit_softcapping": cap if cap > 0 else None,
        "rope_parameters": _rope(file, full),
    }


def _one_of_each(file: GgufFile, key: str, numbers: list[int], windows: list[bool]) -> dict[bool, int]:
    """The number of layers with a window, and without, which must be the same in all of them."""
    found = {kind: {each for each, window in zip(numbers, windows, strict=True) if window == kind} for kind in windows}
    if any(len(each) > 1 for each in found.values()):
        raise ValueError(f"{file.path}: gemma4.{key}: expected one number of layers of a kind, got {shown(numbers)}")
    return {kind: each.pop() for kind, each in found.items()}


def _widths(file: GgufFile, layers: int, shared: int) -> tuple[int, bool]:
    """The width of the MLP, and whether layers that share keys and values have it twice."""
    widths = of_layers(file, "feed_forward_length")
    first = widths[0]
    for double in (False, True):
        if first and widths == [first] * (layers - shared) + [first * (1 + double)] * shared:
            return first, double
    raise ValueError(
        f"{file.path}: gemma4.feed_forward_length: expected one width, or twice of it in the last {shared} layers, got "
        f"{shown(widths)}"
    )


def _rope(file: GgufFile, size: int) -> Entries:
    """How positions are rotated: in layers without a window the first pairs of each head, as divisors tell."""
    rope = {"full_attention": file.of_model("rope.freq_base", float, 1_000_000.0)}
    rope["sliding_attention"] = file.of_model("rope.freq_base_swa", float, 10_000.0)
    for key, value in rope.items():
        check_above_0(file, f"rope.freq_base of {key}", value)
    stored = file.tensors.get("rope_freqs.weight")
    if stored is None or stored.kind or tuple(stored.stored.shape) != (size // 2,):
        raise ValueError(f"{file.path}: rope_freqs.weight: expected {size // 2} floats; get a complete file")
    factors = stored.stored[...].float()
    rotated = int((factors == 1).sum())
    expected = torch.arange(len(factors)) < rotated
    if not torch.equal(factors == 1, expected) or not torch.equal(factors < _UNROTATED, expected):
        raise ValueError(f"{file.path}: rope_freqs.weight: expected 1 for pairs that are rotated, then 1e30")
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": rope["full_attention"],
            "partial_rotary_factor": rotated / len(factors),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": rope["sliding_attention"]},
    }


def _ends(file: GgufFile) -> int | list[int] | None:
    """The tokens that end a text; the file's own if its vocabulary is another."""
    stated = file.expect("tokenizer.ggml.eos_token_id", int, -1)
    tokens = file.expect("tokenizer.ggml.tokens", list, [])
    found = [tokens.index(each) for each in _ENDS if each in tokens]
    rows = file.tensors["token_embd.weight"].stored.shape[0]
    ends = sorted({each for each in (stated, *found) if 0 <= each < rows})
    return ends if len(ends) > 1 else next(iter(ends), None)
