"""`from_pretrained` and `load`: a model from a directory, whatever it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.ao.quantization import QConfigMapping
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ..checkpoints import Stored, find_quantization_config, open_directory, open_tensors
from ..conversion.description import METHOD
from ..conversion.prepare import FLOAT_REASONS, warn_of_float
from ..conversion.qconfig import get_weight_only_quant_qconfig_mapping, needs_calibration
from ..conversion.rules import choose_qconfigs
from ..nn import QuantizedModule
from ..numerics.scheme import FLOAT_DTYPES, WoqWeightDtype
from ..reading import read_json, shown
from .cache.layers import NativeLayer
from .optimization import completed, optimize
from .saved.checkpoint import plan_of
from .saved.float_models import check_complete, check_float, concrete_class, load_float_model, model_class
from .saved.repositories import Source, local_path
from .saved.rounding import FloatPlan, plan_rounding, plan_storage
from .saved.streaming import LayerSource
from .saving import load_saved, transformers_errors


def from_pretrained(
    directory: str | os.PathLike,
    dtype: torch.dtype | None = None,
    quantization_config: QConfigMapping | None = None,
    *,
    kv_cache_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    filename: str | None = None,
) -> PreTrainedModel:
    """The model in `directory`, quantized or not, optimized for inference as by `optimize`.

    `directory` may be the id of a repository of the Hugging Face hub, as in ``"organization/name"``, whose files are
    downloaded to the hub's cache; the arguments from `revision` on are those of `Source`.

    - A float model is quantized as `quantization_config` says, if given; each linear layer as it is read, if weights
      are only rounded to nearest.
    - Of a checkpoint that another tool quantized, every weight keeps its codes, scales and zero points; each is read
      and packed in turn, and never made in float. `quantization_config` only sets the layers' compute mode, by default
      that of the activations' dtype. The formats are in docs/checkpoints.md.
    - A model that `save` wrote comes back as it was, and takes no `quantization_config`.

    `dtype`, of activations and float weights, is float32, bfloat16 or float16; None is the dtype that the directory
    states. `kv_cache_dtype` is that of `optimize`. Code in the directory is run with `trust_remote_code` only. Raises
    OSError where the hub cannot be reached, and ValueError for a directory or repository without a model, formats and
    options that are not supported, files that are damaged, and weights that are missing or do not fit the model.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    NativeLayer(kv_cache_dtype)  # raises for a bad dtype before anything is read
    source = Source(revision, token, cache_dir, local_files_only, filename)
    path = model_directory(local_path(directory, source, trust_remote_code))
    quantization = find_quantization_config(path)
    if quantization is None:
        return _float_model(path, _dtype(path, dtype), quantization_config, kv_cache_dtype, trust_remote_code)
    if quantization.get("quant_method") == METHOD:
        if quantization_config is not None:
            raise ValueError(f"quantization_config: the model in {path} is quantized already; leave it out")
        model = load_saved(path, dtype, trust_remote_code)
        return model if kv_cache_dtype is None else completed(model, kv_cache_dtype)
    mapping = quantization_config or get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    checkpoint = open_directory(path)
    layers = LayerSource(lambda model: plan_of(model, checkpoint, mapping))
    model = _with_layers(path, _dtype(path, dtype), layers, checkpoint.other_tensors(), trust_remote_code)
    return completed(model, kv_cache_dtype)


def load(directory: str | os.PathLike, trust_remote_code: bool = False, **source: Any) -> PreTrainedModel:
    """`from_pretrained` of a model that is quantized already; raises ValueError for one that is not, too.

    `source` are the arguments of `Source`, if `directory` is the id of a repository.
    """
    path = model_directory(local_path(directory, Source(**source), trust_remote_code))
    if find_quantization_config(path) is None:
        raise ValueError(f"{path}: expected a quantized model; llm.from_pretrained loads float models, too")
    return from_pretrained(path, trust_remote_code=trust_remote_code)


def model_directory(directory: str | os.PathLike) -> Path:
    """The path of a directory with a config.json; ValueError if there is none."""
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a directory with a config.json")
    return path


def _dtype(path: Path, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, or the one that config.json states, or bfloat16."""
    if dtype is not None:
        return dtype
    config = read_json(path / "config.json")
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    stated = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    names = {f"{each}".removeprefix("torch."): each for each in FLOAT_DTYPES}
    return next((names[name] for name in stated if isinstance(name, str) and name in names), torch.bfloat16)


def _float_model(
    path: Path,
    dtype: torch.dtype,
    mapping: QConfigMapping | None,
    kv_cache_dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The float model in `path`, quantized as `mapping` says, linear layers while they are read if that is enough."""
    if mapping is not None and not needs_calibration(mapping):
        return load_rounded(path, dtype, lambda _: mapping, kv_cache_dtype, trust_remote_code)
    model = load_float_model(path, dtype, trust_remote_code)
    options = {"quantization_config": mapping, "kv_cache_dtype": kv_cache_dtype}
    return optimize(model, dtype=dtype, inplace=True, **options)


def load_rounded(
    path: Path,
    dtype: torch.dtype,
    mapping_of: Callable[[PreTrainedModel], QConfigMapping],
    kv_cache_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The float model in `path`, quantized as `mapping_of` says of it, which needs no calibration, and optimized.

    `mapping_of` gets the model without its weights. Weights that are rounded to nearest are so as they are read.
    """
    mapping: QConfigMapping | None = None

    def plan(model: PreTrainedModel) -> FloatPlan:
        nonlocal mapping
        mapping = mapping_of(model)
        return plan_rounding(model, tensors, mapping)

    check_float(path)
    tensors = open_tensors(path)
    model = _with_layers(path, dtype, LayerSource(plan), tensors, trust_remote_code)
    left, _ = choose_qconfigs(mapping, model)
    if not left and any(isinstance(module, QuantizedModule) for module in model.modules()):
        warn_of_float(model, getattr(model, FLOAT_REASONS))
        return completed(model, kv_cache_dtype)
    options = {"quantization_config": mapping, "kv_cache_dtype": kv_cache_dtype}
    return optimize(model, dtype=dtype, inplace=True, **options)


def load_stored(
    path: Path,
    dtype: torch.dtype,
    mapping_of: Callable[[PreTrainedModel], QConfigMapping],
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The float model in `path`, in which each linear layer that `mapping_of` quantizes is a `StoredLinear`.

    `mapping_of` gets the model without its weights.
    """
    check_float(path)
    tensors = open_tensors(path)
    source = LayerSource(lambda model: plan_storage(model, tensors, mapping_of(model)))
    return _with_layers(path, dtype, source, tensors, trust_remote_code)


def _with_layers(
    path: Path, dtype: torch.dtype, source: LayerSource, tensors: Mapping[str, Stored], trust_remote_code: bool
) -> PreTrainedModel:
    """The model of config.json with the layers of `source`, and the `tensors` that these do not take."""
    content = read_json(path / "config.json")
    found = model_class(path, content, trust_remote_code)
    with transformers_errors(path):
        found = concrete_class(found, path, content)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        if (path / "generation_config.json").is_file():
            options["generation_config"] = GenerationConfig.from_pretrained(path, local_files_only=True)
        model, info = found.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            quantization_config=source,
            dtype=dtype,
            **options,
        )
    config.name_or_path = str(path)
    check_complete(path, model, info["missing_keys"])
    wrong = {kind: sorted(names, key=str)[:5] for kind, names in info.items() if names and kind != "unexpected_keys"}
    if wrong:
        raise ValueError(f"{path}: the tensors do not fit a {type(model).__name__}: {shown(wrong)}")
    return model.eval()
