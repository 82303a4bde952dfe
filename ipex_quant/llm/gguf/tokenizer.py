"""`gguf_tokenizer`: the tokenizer whose vocabulary and merges a GGUF file holds."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...checkpoints import GgufFile
from .pre_tokenizers import make_pre_tokenizer

_PARTS = {
    "tokenizer_type": ("model", str),
    "pre_tokenizer_type": ("pre", str),
    "tokens": ("tokens", list),
    "scores": ("scores", list),
    "token_type": ("token_type", list),
    "merges": ("merges", list),
    "bos_token_id": ("bos_token_id", int),
    "eos_token_id": ("eos_token_id", int),
    "unk_token_id": ("unknown_token_id", int),
    "pad_token_id": ("padding_token_id", int),
    "add_prefix_space": ("add_space_prefix", bool),
}
"""What transformers' converter takes, and the entries of ``tokenizer.ggml`` that give it."""


MAX_TOKEN = 1024
"""Most characters of a token: merges are looked for in all of its parts."""


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer in `file`, made by transformers' own converter.

    Raises ValueError for a file without one, entries of other types, ids outside the vocabulary, and kinds of
    tokenizers that transformers does not convert.
    """
    parts: dict[str, Any] = {}
    for name, (key, expected) in _PARTS.items():
        if f"tokenizer.ggml.{key}" in file.metadata:
            parts[name] = file.expect(f"tokenizer.ggml.{key}", expected)
    tokens = parts.get("tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens: expected the tokens of a vocabulary")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens: expected at most {MAX_TOKEN} characters in each")
    for name, numbers in (("scores", (int, float)), ("token_type", int)):
        values = parts.get(name)
        if values is not None and (len(values) != len(tokens) or not all(isinstance(each, numbers) for each in values)):
            raise ValueError(f"{file.path}: tokenizer.ggml.{name}: expected a number for each of {len(tokens)} tokens")
    merges = parts.get("merges", [])
    if not all(isinstance(merge, str) and re.fullmatch(r"[^ ]+ [^ ]+", merge) for merge in merges):
        raise ValueError(f"{file.path}: tokenizer.ggml.merges: expected pairs of tokens")
    special = {name: _token(file, tokens, parts.get(f"{name}_id")) for name in _SPECIAL}
    kind = parts.get("tokenizer_type")
    # Gemma 4's chat template writes the first token itself; its files say that llama.cpp adds it.
    adds_bos = file.expect("tokenizer.ggml.add_bos_token", bool, kind == "llama") and kind != "gemma4"
    try:
        backend, _ = _converter()(file.architecture, parts)
    except Exception as error:  # the tokenizers library raises no subclass of it
        raise ValueError(f"{file.path}: transformers makes no tokenizer of it ({error})") from error
    if kind == "gpt2":  # which transformers does not divide by the name that the file gives
        divider = make_pre_tokenizer(parts.get("pre_tokenizer_type", ""))
        backend.pre_tokenizer = backend.pre_tokenizer if divider is None else divider
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=adds_bos,
        add_eos_token=file.expect("tokenizer.ggml.add_eos_token", bool, False),
        chat_template=file.expect("tokenizer.chat_template", str, "") or None,
        **{name: token for name, token in special.items() if token is not None},
    )
    tokenizer.name_or_path = str(file.path)
    return tokenizer


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def _token(file: GgufFile, tokens: list[str], number: int | None) -> str | None:
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml: the token {number} is none of {len(tokens)}")
    return tokens[number]


def _converter() -> Any:
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # where older releases have it
        from transformers.integrations.ggml import convert_gguf_tokenizer
    return convert_gguf_tokenizer
