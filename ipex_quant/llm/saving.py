"""`save` and `load_saved`: directories of quantized models, read back bit-equal."""

from __future__ import annotations

import inspect
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..checkpoints.files import indexed_files, open_tensors
from ..nn import QuantizedModule
from ..reading import read_json, shown
from ..writing import replaced_directory
from .saved.float_models import concrete_class, config_of, model_class
from .saved.hf_quantizer import IpexQuantConfig, IpexQuantizer, describe_model
from .saved.mark import mark
from .saved.parallel import tensor_parallelism
from .saved.streaming import check_room

MAX_SHARD_SIZE = "5GB"


def save(model: PreTrainedModel, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write a model that `optimize` or `convert` quantized, and its `tokenizer` if given, to `directory`.

    The files are those of `save_pretrained`: config.json and plain tensors in safetensors, several files when large.
    transformers refuses them where this package is not imported.
    A model in `directory` is replaced as a whole: after a kill at any moment it holds the old or the new one. Other
    files in it stay. Raises TypeError for another kind of model, ValueError for one that is not quantized, and OSError
    if a file cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError("model: expected one that ipex_quant.llm.optimize or quantization.convert quantized")
    model.config.quantization_config = describe_model(model)
    with replaced_directory(directory, stale=("model*.safetensors*",)) as staging:
        # Keep the model's names: transformers' conversions to the original checkpoint ignore quantized tensors.
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE, save_original_format=False)
        mark(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        make_readable(staging)


def make_readable(directory: Path) -> None:
    """Give files in `directory` the permissions of the umask; safetensors makes them private."""
    for file in filter(Path.is_file, directory.iterdir()):
        file.chmod(stat.S_IMODE(directory.stat().st_mode) & 0o666)


def load_saved(
    directory: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False, tp_plan: str | None = None
) -> PreTrainedModel:
    """Load a directory that `save` or the model's `save_pretrained` wrote, without making float weights.

    `dtype` is the saved one if None, `tp_plan` that of `from_pretrained`. Raises ValueError for damaged files, and for
    missing, additional or unfitting tensors.
    """
    config = read_json(directory / "config.json")
    found = model_class(directory, config, trust_remote_code)
    for index in directory.glob("*.index.json"):  # transformers would read whatever it names
        indexed_files(index)
    with transformers_errors(directory):
        _check_shapes(concrete_class(found, directory, config), directory, trust_remote_code)
        options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
        options["ignore_mismatched_sizes"] = True  # they are reported below, by name, like missing tensors
        # The saved dtype, whatever config.json says besides.
        options["dtype"] = config["quantization_config"].get("dtype") if dtype is None else dtype
        if tp_plan is not None:
            options["distributed_config"] = tensor_parallelism(tp_plan)
        model, info = found.from_pretrained(directory, trust_remote_code=trust_remote_code, **options)
        if _lacks_pooler(model, info["missing_keys"]):
            model, info = found.from_pretrained(directory, add_pooling_layer=False, **options)
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{directory}: the tensors do not fit the model: {wrong}")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"{directory}: {name}: expected a float dtype, got {parameter.dtype}")
    return model


def _check_shapes(kind: Any, directory: Path, trust_remote_code: bool) -> None:
    """ValueError for tensors of other shapes than those of the model, before transformers makes any of that size.

    Tensors by other names than the model's, and missing ones, are left to transformers, unless they are most of it.
    """
    config = config_of(kind, directory, trust_remote_code)
    tensors = open_tensors(directory)
    with torch.device("meta"):
        model = kind(config)
        IpexQuantizer(IpexQuantConfig(**config.quantization_config)).preprocess_model(model)
    for name, expected in model.state_dict(keep_vars=True).items():
        stored = tensors.get(name)
        if stored is not None and stored.shape != expected.shape:
            raise ValueError(f"{directory}: {name}: expected shape {list(expected.shape)}, got {list(stored.shape)}")
    check_room(model, tensors)


@contextmanager
def transformers_errors(directory: Path) -> Iterator[None]:
    """Turn the errors of any kind that transformers raises for wrong files into a ValueError that names `directory`."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{directory}: a safetensors file is damaged ({error})") from error
    except (OSError, TypeError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{directory}: transformers cannot make a model of it ({shown(error)})") from error


def _lacks_pooler(model: PreTrainedModel, missing: Collection[str]) -> bool:
    """Whether only an encoder's pooler is `missing`, and the model's class can be made without one."""
    optional = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    return bool(missing) and optional and all(name.startswith("pooler.") for name in missing)
