"""How a byte-level BPE tokenizer divides a text before it merges: llama.cpp's names, and tokenizers' objects for them.

Source: llama.cpp's ``llama-vocab.cpp`` and the ``tokenizer.json`` of the models that the names are of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NUMBERS: Mapping[str, str] = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
"""How numbers are divided by expressions that are the same in the rest."""


def make_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """What divides texts as `name` says; None for names that are not known."""
    if name in _NUMBERS:
        split = pre_tokenizers.Split(Regex(_START + _NUMBERS[name] + _END), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    return whole if name == "gpt-2" else None


def pre_tokenizer_name(content: Any) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a ``tokenizer.json``; None if there is none."""
    parts = content.get("pretokenizers", [content]) if isinstance(content, dict) else []
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = (parts[0].get("pattern") or {}).get("Regex", "")
        return next((name for name, part in _NUMBERS.items() if pattern.startswith(f"{_START}{part}|")), None)
    return None
