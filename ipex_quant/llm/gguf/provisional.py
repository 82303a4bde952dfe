"""`provisional_config`: the configuration of a GGUF file of which only metadata and the names of tensors are known.

That is all that transformers knows when it chooses a class. What tensors tell besides, their sizes and how frequencies
of positions are divided, is corrected when the file is open.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints import GgufFile, GgufTensor
from ...reading import shown
from .configuration import gguf_config

_TOKENS = "tokenizer.ggml.tokens"


def provisional_config(metadata: Mapping[str, Any], names: Collection[str]) -> PreTrainedConfig:
    """What `gguf_config` says of a file with these `metadata` and `names` of tensors, as far as these tell.

    The tokens in `metadata` may be their number. Raises ValueError as `gguf_config` does.
    """
    tokens = metadata.get(_TOKENS, 0)
    file = GgufFile(Path("the GGUF file"), {key: value for key, value in metadata.items() if key != _TOKENS}, {})
    rows = (len(tokens) if isinstance(tokens, list) else tokens) or file.of_model("vocab_size", int, 0)
    if type(rows) is not int or not 0 < rows < 1 << 31:
        raise ValueError(f"{file.path}: vocab_size: expected the number of tokens, got {shown(rows)}")
    size = file.of_model("rope.dimension_count", int, file.head_size())
    if not 0 <= size < 1 << 20:
        raise ValueError(f"{file.path}: rope.dimension_count: expected a size, got {size}")
    # tables of embeddings have a row a token, divisors of frequencies are 1 until they are known
    tables = ("token_embd.weight", "per_layer_token_embd.weight")
    shapes = {name: (rows if name in tables else size // 2 if "rope" in name else 0,) for name in names}
    tensors = {name: GgufTensor("", torch.ones(1, device="cpu").expand(shape)) for name, shape in shapes.items()}
    return gguf_config(GgufFile(file.path, file.metadata, tensors))


def correct_config(config: PreTrainedConfig, file: GgufFile) -> None:
    """Give `config`, a `provisional_config` whose entries a user may have changed, what the tensors of `file` tell.

    Raises ValueError as `gguf_config` does, and for the configuration of another model.
    """
    own, usual = gguf_config(file), provisional_config(file.metadata, file.tensors.keys())
    if type(config) is not type(own):
        raise ValueError(f"{file.path}: expected the configuration of a {own.model_type}, got a {config.model_type}'s")
    for key, value in vars(own).items():
        if vars(usual).get(key) != value:
            vars(config)[key] = value  # past the checks of single entries: together they fit
