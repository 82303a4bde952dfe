"""`tokenizer_metadata`: a tokenizer as metadata of a GGUF file, for llama.cpp's two kinds of BPE.

"gpt2" is byte-level BPE: merges by rank, and a name for how texts are divided before. "llama" is SentencePiece's: of
two neighbors those are merged whose token has the highest score, and bytes stand for what no token has. Source:
llama.cpp's ``convert_hf_to_gguf.py`` and ``llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..gguf.pre_tokenizers import pre_tokenizer_name

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
_LEAVE = "leave the tokenizer out"


def tokenizer_metadata(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """Metadata of a BPE `tokenizer`, with names for unused numbers below `vocabulary`.

    Without a tokenizer the file says that it has none. Raises ValueError for tokenizers of another kind, and for those
    that llama.cpp would divide or merge texts otherwise with.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer: GGUF is written with BPE; {_LEAVE}")
    bytewise = "ByteLevel" in json.dumps(content.get("decoder"))
    if bytewise and model.get("byte_fallback"):
        raise ValueError(f"tokenizer: GGUF is written with byte-level BPE or byte_fallback, got both; {_LEAVE}")
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if max(tokens) >= vocabulary:
        raise ValueError(f"tokenizer: it has the token {max(tokens)}, the model {vocabulary} tokens")
    own = _byte_level(content) if bytewise else _sentence_piece(content, tokens, kinds, vocabulary)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(vocabulary)],
        "tokenizer.ggml.token_type": [kinds.get(number, _USER_DEFINED) for number in range(vocabulary)],
        **{f"tokenizer.ggml.{key}": value for key, value in own.items()},
    }
    for key in ("add_bos_token", "add_eos_token"):
        if key == "add_bos_token" or hasattr(tokenizer, key):
            metadata[f"tokenizer.ggml.{key}"] = bool(getattr(tokenizer, key, False))
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


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    name = pre_tokenizer_name(content.get("pre_tokenizer"))
    if name is None:
        raise ValueError(f"tokenizer: llama.cpp has no name for how it divides texts; {_LEAVE}")
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in _merges(content["model"])]}


def _sentence_piece(
    content: Mapping[str, Any], tokens: Mapping[int, str], kinds: dict[int, int], vocabulary: int
) -> dict[str, Any]:
    """Scores that make llama.cpp merge as `content` says, and whether it puts a space before a text.

    Marks bytes and the unknown token in `kinds`. Raises ValueError where no scores do: a token's merges must follow
    each other, and be all pairs of tokens that make it.
    """
    model = content["model"]
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    if not model.get("byte_fallback") or not names <= model["vocab"].keys():
        raise ValueError(f"tokenizer: GGUF is written with byte-level BPE, or tokens for all bytes; {_LEAVE}")
    for number, token in tokens.items():
        if token in names:
            kinds[number] = _BYTE
        elif token == model.get("unk_token"):
            kinds[number] = _UNKNOWN
    rank = _ranks(model, {tokens[number] for number, kind in kinds.items() if kind == _NORMAL})
    # a token that nothing makes is never merged, whatever its score
    scores = [float(-rank.get(tokens.get(number, ""), 0)) for number in range(vocabulary)]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": _puts_a_space_first(content)}


def _ranks(model: Mapping[str, Any], normal: set[str]) -> dict[str, int]:
    """The place of each token that merges make, in their order; ValueError if scores cannot stand for them.

    Tokens that are not `normal` are found in texts, or stand for bytes.
    """
    rank: dict[str, int] = {}
    pairs: dict[str, int] = {}
    latest = ""
    for first, second in _merges(model):
        made = first + second
        if made != latest and made in rank:
            raise ValueError(f"tokenizer: the merges that make {made!r} are apart, llama.cpp has one score; {_LEAVE}")
        rank.setdefault(made, len(rank) + 1)
        pairs[made] = pairs.get(made, 0) + 1
        latest = made
    vocabulary = model["vocab"]
    for token in normal & vocabulary.keys():
        possible = sum(token[:at] in vocabulary and token[at:] in vocabulary for at in range(1, len(token)))
        if possible > pairs.get(token, 0):
            raise ValueError(
                f"tokenizer: {possible - pairs.get(token, 0)} pairs of tokens make {token!r} without a merge, which "
                f"llama.cpp would merge; {_LEAVE}"
            )
    return rank


def _puts_a_space_first(content: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space more; ValueError for other changes of texts than that and of spaces."""
    normalizer, divider = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    first = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            first = True
        elif step.get("type") != "Replace" or (step.get("pattern"), step.get("content")) != ({"String": " "}, _SPACE):
            raise ValueError(f"tokenizer: llama.cpp does not do {step.get('type')} to texts; {_LEAVE}")
    if divider.get("type") == "Metaspace" and divider.get("replacement") == _SPACE and not divider.get("split", True):
        return first or divider.get("prepend_scheme") in ("first", "always")
    spaces = divider.get("type") == "Split" and divider.get("pattern") == {"String": " "}
    if divider and not spaces:  # after spaces were replaced, a division at them does nothing
        raise ValueError(f"tokenizer: llama.cpp does not divide texts by {divider.get('type')}; {_LEAVE}")
    return first
