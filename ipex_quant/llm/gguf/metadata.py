"""Sizes out of a GGUF file's metadata, as configurations of several architectures need them.

Source: the entries that llama.cpp's ``convert_hf_to_gguf.py`` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoints import GgufFile
from ...reading import shown
from .rope import rope_parameters

Entries = dict[str, Any]

MAX_LAYERS = 10_000
"""Most layers; each makes modules before a tensor is looked for."""

SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
}
RMS_NORM = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}

_PARTLY_ROTATED = ("minimax-m2", "nemotron", "phi3", "qwen35", "qwen35moe", "stablelm")
"""Architectures that may rotate a part of each head."""

EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


def sizes_of(file: GgufFile, *tables: Mapping[str, str], without: tuple[str, ...] = ()) -> Entries:
    """The sizes and numbers that `file` states; ValueError for those that are missing or absurd."""
    entries: Entries = {}
    for name, key in {k: v for table in (SIZES, *tables) for k, v in table.items()}.items():
        if name in without:
            continue
        entries[name] = file.of_model(key, float if name.endswith(("eps", "epsilon")) else int)
        if not 0 < entries[name] < 1 << 31:
            raise ValueError(f"{file.path}: {file.architecture}.{key}: expected a size, got {entries[name]}")
    if entries.get("num_hidden_layers", 0) > MAX_LAYERS:
        raise ValueError(f"{file.path}: {file.architecture}.block_count: expected at most {MAX_LAYERS}")
    return entries


def of_layers(file: GgufFile, key: str, default: int | None = None) -> list[int]:
    """A number of every layer, which files give once if it is the same in all; ValueError for no sizes or 0."""
    layers = sizes_of(file, without=tuple(name for name in SIZES if name != "num_hidden_layers"))["num_hidden_layers"]
    stated = file.metadata.get(f"{file.architecture}.{key}", default)
    numbers = stated if isinstance(stated, list) else [stated] * layers
    if len(numbers) != layers or not all(type(each) is int and 0 <= each < 1 << 31 for each in numbers):
        raise ValueError(
            f"{file.path}: {file.architecture}.{key}: expected a number, or one of each of {layers} layers, got "
            f"{shown(stated)}"
        )
    return numbers


def has_part(file: GgufFile, part: str) -> bool:
    """Whether the first layer, or a later one, has the tensor `part`."""
    return any(name.startswith("blk.") and name.split(".", 2)[-1] == part for name in file.tensors)


def attention_sizes(file: GgufFile, *tables: Mapping[str, str], without: tuple[str, ...] = ()) -> Entries:
    """Sizes of a decoder with rotated heads, some of which may share keys and values."""
    entries = sizes_of(file, *tables, without=without)
    entries["num_key_value_heads"] = file.of_model("attention.head_count_kv", int, entries["num_attention_heads"])
    size = file.of_model("attention.key_length", int, entries["hidden_size"] // entries["num_attention_heads"])
    if not 0 < size < 1 << 20:
        raise ValueError(f"{file.path}: {file.architecture}.attention.key_length: expected a size, got {size}")
    check_heads(file, entries["num_attention_heads"], entries["num_key_value_heads"], size)
    used, experts = entries.get("num_experts_per_tok", 0), entries.get("num_experts", entries.get("num_local_experts"))
    if experts is not None and used > experts:
        raise ValueError(f"{file.path}: expert_used_count: expected at most {experts}, got {used}")
    entries["head_dim"] = size
    entries["rope_parameters"] = rope_parameters(file, size)
    return entries


def check_heads(file: GgufFile, heads: int, groups: int, size: int) -> None:
    """ValueError unless `groups` of keys and values divide the heads, and heads are rotated as `file` may say."""
    if groups <= 0 or heads % groups:
        raise ValueError(f"{file.path}: attention.head_count_kv: expected a divisor of {heads} heads, got {groups}")
    rotated = file.of_model("rope.dimension_count", int, size)
    if rotated != size and (file.architecture not in _PARTLY_ROTATED or not 0 < rotated < size or rotated % 2):
        raise ValueError(f"{file.path}: rope.dimension_count: expected the {size} of a head, got {rotated}")


def rotate_partly(file: GgufFile, entries: Entries, size: int) -> int:
    """How many of the `size` values of a head are rotated; enters their part of it into the rope parameters."""
    rotated = file.of_model("rope.dimension_count", int, size)
    entries["rope_parameters"]["partial_rotary_factor"] = rotated / size
    return rotated
