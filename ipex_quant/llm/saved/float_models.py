"""`load_float_model`: load a float model from a directory, of the class that its config.json names."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ...checkpoints.files import find_quantization_config, indexed_files
from ...reading import read_json, shown
from ..gguf.deci import DeciForCausalLM

_OWN = {DeciForCausalLM.__name__: DeciForCausalLM}
"""Models that transformers has not, by the names of their classes."""


def load_float_model(
    directory: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in `directory`, of the class that `architectures` in its config.json names, in eval mode.

    Code in the directory is run with `trust_remote_code` only. Raises ValueError for a directory without a config.json,
    a model that is quantized already, missing weights (which transformers would initialize at random), damaged files,
    and a class that transformers does not have.
    """
    directory = Path(directory)
    config = check_float(directory)
    options = {"dtype": dtype, "local_files_only": True, "trust_remote_code": trust_remote_code}
    found = model_class(directory, config, trust_remote_code)
    try:
        model, info = found.from_pretrained(directory, **options, output_loading_info=True)
    except SafetensorError as error:  # its message does not name the directory
        raise ValueError(f"{directory}: {error}") from error
    check_complete(directory, model, info["missing_keys"])
    return model.eval()


def check_complete(directory: Path, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Raise ValueError if tensors of `model` are `missing` in `directory`; transformers would initialize them."""
    if missing:
        raise ValueError(
            f"{directory}: the checkpoint lacks {len(missing)} tensors of a {type(model).__name__}, such as "
            f"{sorted(missing)[:3]}; get a complete one"
        )


def check_float(directory: Path) -> dict[str, Any]:
    """The config.json of a directory; ValueError unless it is a float model's, with weights beside it."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: expected a model directory with a config.json")
    config = read_json(directory / "config.json")
    quantization = find_quantization_config(directory)
    if quantization is not None:
        method = quantization.get("quant_method")
        raise ValueError(f"{directory}: expected a float model, got one that is quantized already, by {shown(method)}")
    for index in directory.glob("*.index.json"):  # transformers would read whatever it names
        indexed_files(index)
    if not any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        found = [file.name for file in sorted(directory.iterdir()) if file.suffix in (".pt", ".pth")]
        raise ValueError(f"{directory}: expected weights in *.safetensors or *.bin files, found {found or 'none'}")
    return config


def model_class(directory: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """The model class that `config` names, or the transformers ``AutoModel`` class that loads it from `directory`.

    Raises ValueError when transformers has no such class, and when it is code in `directory` that is not trusted.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"{directory}: architectures in config.json: expected names of classes, got {shown(names)}")
    name = names[0]
    found = _OWN.get(name) or getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    own = config.get("auto_map") if isinstance(config.get("auto_map"), dict) else {}
    automatic = [key for key, value in own.items() if key.startswith("AutoModel") and f"{value}".endswith(f".{name}")]
    if not automatic or not hasattr(transformers, automatic[0]):
        raise ValueError(f"{directory}: transformers {transformers.__version__} has no model {name[:100]}")
    if not trust_remote_code:
        raise ValueError(
            f"{directory}: {name[:100]} is code in the directory, which is not run; read it, and if you trust it, "
            "allow it with trust_remote_code"
        )
    return getattr(transformers, automatic[0])


def concrete_class(found: Any, directory: Path, config: dict[str, Any]) -> Any:
    """The class of trusted code in `directory` for `found`, if that is an ``AutoModel`` class, else `found`."""
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return get_class_from_dynamic_module(config["auto_map"][found.__name__], directory, local_files_only=True)


def config_of(found: Any, directory: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in `directory`, of the kind that the model class `found` has; raises as transformers does."""
    kind = found.config_class or AutoConfig  # classes of this package are in no table of transformers
    return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
