"""Directories of quantized models: what `save` writes, `load` reads back bit-equal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..nn import QuantizedModule
from ..quantization._description import METHOD
from ..writing import replaced_directory
from .hf_quantizer import describe_model

MAX_SHARD_SIZE = "5GB"


def save(model: PreTrainedModel, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write a model that `optimize` or `convert` quantized, as it is now, and its `tokenizer` if given, to `directory`.

    The files are those of `save_pretrained`: config.json and plain tensors in safetensors, several files when large.
    A model that `directory` holds is replaced as a whole: after a kill at any moment it holds the old or the new one.
    Other files in it stay. Raises TypeError for another kind of model, ValueError for one that is not quantized, and
    OSError for what cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError("model: expected one that ipex_quant.llm.optimize or quantization.convert quantized")
    model.config.quantization_config = describe_model(model)
    with replaced_directory(directory, stale=("model*.safetensors*",)) as staging:
        # The model's own names: conversions to those of the original checkpoint do not know quantized tensors.
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def load(directory: str | os.PathLike) -> PreTrainedModel:
    """Load a directory that `save` or the model's `save_pretrained` wrote; no float weight is made on the way.

    Raises ValueError for a directory without a quantized model's config.json, for damaged files, and for missing,
    additional or unfitting tensors.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: expected a directory with a config.json")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
        (architecture,) = config["architectures"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / 'config.json'}: not a model's configuration ({error!r})") from error
    if method != METHOD:
        raise ValueError(
            f"{directory}: expected quant_method {METHOD!r} in config.json, got {method!r}; load other models with "
            "transformers and llm.optimize"
        )
    model_class = getattr(transformers, str(architecture), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(f"{directory}: transformers {transformers.__version__} has no model {architecture}")
    try:
        # Tensors of another shape are reported below, by name, like all that do not fit.
        options = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(directory, **options)
    except SafetensorError as error:
        raise ValueError(f"{directory}: a safetensors file is damaged ({error})") from error
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{directory}: the tensors do not fit the model: {wrong}")
    return model
