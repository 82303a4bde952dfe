"""A mark in config.json by which transformers alone refuses a saved model, instead of making up the weights it misses.

transformers takes the key for the name of the file of weights. It quotes a name that is none in its ValueError.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ...conversion.description import METHOD
from ...reading import read_json
from ...writing import write_whole

KEY = "transformers_weights"
TEXT = (
    "this model is quantized by ipex_quant, which reads it: `import ipex_quant.llm` before from_pretrained, use "
    "ipex_quant.llm.load, or serve it by `ipex-quant serve`"
)


def mark(directory: str | os.PathLike) -> None:
    """Mark the config.json in `directory`, if there is one and it describes a model that is quantized here."""
    file = Path(directory) / "config.json"
    content = read_json(file) if file.is_file() else {}
    quantization = content.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        mode = file.stat().st_mode
        write_whole(file, json.dumps({**content, KEY: TEXT}, indent=2, sort_keys=True) + "\n")
        file.chmod(mode)


def unmark(config: PreTrainedConfig) -> None:
    """Take the mark off the `config` of a model that is read here; a file's name stays."""
    if not f"{getattr(config, KEY, None) or '.safetensors'}".endswith((".safetensors", ".safetensors.index.json")):
        delattr(config, KEY)


def mark_what_is_saved(model: PreTrainedModel) -> None:
    """Let `save_pretrained` of `model` mark what it writes."""
    # a partial, which can be copied and pickled with the model
    model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike, is_main_process: bool = True, **options: Any
) -> None:
    """`save_pretrained` of the model's class, which marks what it wrote, but not what it pushed to the hub."""
    type(model).save_pretrained(model, save_directory, is_main_process, **options)
    if is_main_process:
        mark(save_directory)
