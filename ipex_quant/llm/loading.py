"""`from_pretrained`, `load` and `load_tokenizer`: a model from a directory, whatever it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.ao.quantization import QConfigMapping
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoints import (
    Checkpoint,
    GgufFile,
    Stored,
    find_gguf,
    find_quantization_config,
    open_directory,
    open_gguf,
    open_gguf_checkpoint,
    open_tensors,
)
from ..conversion.description import METHOD
from ..conversion.prepare import FLOAT_REASONS, warn_of_float
from ..conversion.qconfig import get_weight_only_quant_qconfig_mapping, needs_calibration
from ..conversion.rules import choose_qconfigs
from ..nn import QuantizedModule
from ..numerics.scheme import FLOAT_DTYPES, WoqWeightDtype
from ..reading import read_json, shown
from .cache.layers import NativeLayer
from .gguf import gguf_config, gguf_tokenizer
from .optimization import completed, optimize
from .saved.checkpoint import plan_of
from .saved.float_models import (
    check_complete,
    check_float,
    concrete_class,
    config_of,
    load_float_model,
    model_class,
)
from .saved.repositories import Source, local_path
from .saved.rounding import FloatPlan, plan_rounding, plan_storage
from .saved.streaming import LayerPlan, LayerSource
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
    tp_plan: str | None = None,
) -> PreTrainedModel:
    """The model in `directory`, or in a GGUF file, quantized or not, optimized for inference as by `optimize`.

    `directory` may be the id of a repository of the Hugging Face hub, as in ``"organization/name"``, whose files are
    downloaded to the hub's cache; the arguments from `revision` to `filename` are those of `Source`.

    - A float model is quantized as `quantization_config` says, if given; each linear layer as it is read, if weights
      are only rounded to nearest.
    - Of a checkpoint that another tool quantized, every weight keeps its codes, scales and zero points; each is read
      and packed in turn, and never made in float. `quantization_config` only sets the layers' compute mode, by default
      that of the activations' dtype. The formats are in docs/checkpoints.md.
    - Of a GGUF file, or a directory that holds one and no other weights, the configuration comes out of the file. Of a
      model cut into several, any is given.
    - A model that `save` wrote comes back as it was, and takes no `quantization_config`.

    `dtype`, of activations and float weights, is float32, bfloat16 or float16; None is the dtype that the directory
    states. `kv_cache_dtype` is that of `optimize`. With `tp_plan` "auto", the linear layers of a model that `save`
    wrote are divided among the processes that torchrun started (tensor parallelism). Code in the directory is run with
    `trust_remote_code` only. Raises OSError where the hub cannot be reached, and ValueError for a directory or
    repository without a model, formats and options that are not supported, files that are damaged, weights that are
    missing or do not fit the model, and layers that cannot be divided; RuntimeError for a transformers too old for
    `tp_plan`.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    NativeLayer(kv_cache_dtype)  # raises for a bad dtype before anything is read
    if tp_plan not in (None, "auto"):
        raise ValueError(f"tp_plan: expected 'auto' or None, got {tp_plan!r}")
    source = Source(revision, token, cache_dir, local_files_only, filename)
    found = local_path(directory, source, trust_remote_code)
    gguf = find_gguf(found)
    if tp_plan is not None and (gguf is not None or not _is_saved(found)):
        raise ValueError(f"tp_plan: {found} holds no model that llm.save wrote; load it and save it first")
    if gguf is not None:
        return _gguf_model(gguf, _dtype(found, dtype), quantization_config, kv_cache_dtype)
    path = model_directory(found)
    quantization = find_quantization_config(path)
    if quantization is None:
        return _float_model(path, _dtype(path, dtype), quantization_config, kv_cache_dtype, trust_remote_code)
    if quantization.get("quant_method") == METHOD:
        if quantization_config is not None:
            raise ValueError(f"quantization_config: the model in {path} is quantized already; leave it out")
        model = load_saved(path, dtype, trust_remote_code, tp_plan)
        return model if kv_cache_dtype is None else completed(model, kv_cache_dtype)
    return _quantized_model(
        _Shell.of_directory(path, trust_remote_code),
        open_directory(path),
        _dtype(path, dtype),
        quantization_config,
        kv_cache_dtype,
    )


def load(
    directory: str | os.PathLike, trust_remote_code: bool = False, *, tp_plan: str | None = None, **source: Any
) -> PreTrainedModel:
    """`from_pretrained` of a model that is quantized already, or in a GGUF file; raises ValueError for others, too.

    `source` are the arguments of `Source`, if `directory` is the id of a repository.
    """
    path = local_path(directory, Source(**source), trust_remote_code)
    if find_gguf(path) is None and find_quantization_config(model_directory(path)) is None:
        raise ValueError(f"{path}: expected a quantized model; llm.from_pretrained loads float models, too")
    return from_pretrained(path, trust_remote_code=trust_remote_code, tp_plan=tp_plan)


def load_tokenizer(
    directory: str | os.PathLike, trust_remote_code: bool = False, **source: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of what `from_pretrained` loads with the same arguments: of the directory, or out of a GGUF file.

    Raises ValueError for a GGUF file without a tokenizer or with one that transformers does not convert, else as
    transformers does.
    """
    path = local_path(directory, Source(**source), trust_remote_code)
    gguf = find_gguf(path)
    if gguf is not None:
        return gguf_tokenizer(open_gguf(gguf))
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def model_directory(directory: str | os.PathLike) -> Path:
    """The path of a directory with a config.json; ValueError if there is none."""
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a directory with a config.json, or a GGUF file")
    return path


def _is_saved(directory: str | os.PathLike) -> bool:
    quantization = find_quantization_config(model_directory(directory))
    return quantization is not None and quantization.get("quant_method") == METHOD


def _dtype(path: Path, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, or the one that config.json states, or bfloat16 if there is none."""
    if dtype is not None or not (path / "config.json").is_file():
        return dtype or torch.bfloat16
    config = read_json(path / "config.json")
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    stated = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    names = {f"{each}".removeprefix("torch."): each for each in FLOAT_DTYPES}
    return next((names[name] for name in stated if isinstance(name, str) and name in names), torch.bfloat16)


@dataclass(frozen=True)
class _Shell:
    """The class and configuration of the model in `path`, which is made on the meta device."""

    path: Path
    kind: Any
    config: PreTrainedConfig

    @classmethod
    def of_directory(cls, path: Path, trust_remote_code: bool) -> _Shell:
        """What config.json in a directory says; ValueError for a class that transformers does not have."""
        content = read_json(path / "config.json")
        kind = model_class(path, content, trust_remote_code)
        with transformers_errors(path):
            kind = concrete_class(kind, path, content)
            config = config_of(kind, path, trust_remote_code)
        return cls(path, kind, config)

    @classmethod
    def of_gguf(cls, file: GgufFile) -> _Shell:
        """What the metadata of `file` say."""
        config = gguf_config(file)
        return cls(file.path, model_class(file.path, {"architectures": config.architectures}), config)

    def with_layers(
        self, dtype: torch.dtype, plan: Callable[[PreTrainedModel], LayerPlan], tensors: dict[str, Stored]
    ) -> PreTrainedModel:
        """The model with the layers of `plan`, and the `tensors` that these do not take."""
        with transformers_errors(self.path):
            for part in (self.config, self.config.get_text_config(decoder=True)):
                if hasattr(part, "quantization_config"):
                    del part.quantization_config
            options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            if (self.path / "generation_config.json").is_file():
                options["generation_config"] = GenerationConfig.from_pretrained(self.path, local_files_only=True)
            model, info = self.kind.from_pretrained(
                None,
                config=self.config,
                state_dict=tensors,
                quantization_config=LayerSource(plan, tensors),
                dtype=dtype,
                **options,
            )
        self.config.name_or_path = str(self.path)
        check_complete(self.path, model, info["missing_keys"])
        found = {kind: names for kind, names in info.items() if names and kind != "unexpected_keys"}
        wrong = {kind: sorted(names, key=str)[:5] for kind, names in found.items()}
        if wrong:
            raise ValueError(f"{self.path}: the tensors do not fit a {type(model).__name__}: {shown(wrong)}")
        return model.eval()


def _gguf_model(
    path: Path, dtype: torch.dtype, mapping: QConfigMapping | None, kv_cache_dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model in a GGUF file; one in float is quantized as `mapping` says."""
    file = open_gguf(path)
    shell, checkpoint = _Shell.of_gguf(file), open_gguf_checkpoint(file)
    if len(checkpoint):
        return _quantized_model(shell, checkpoint, dtype, mapping, kv_cache_dtype)
    tensors = dict(checkpoint.tensors)
    if mapping is not None and not needs_calibration(mapping):
        return _rounded_model(shell, tensors, dtype, lambda _: mapping, kv_cache_dtype)
    model = shell.with_layers(dtype, lambda model: FloatPlan({}, {}), tensors)
    return _optimized(model, dtype, mapping, kv_cache_dtype)


def _quantized_model(
    shell: _Shell,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    mapping: QConfigMapping | None,
    kv_cache_dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model with the layers of `checkpoint`, which compute as `mapping` says."""
    chosen = mapping or get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    model = shell.with_layers(dtype, lambda each: plan_of(each, checkpoint, chosen), checkpoint.other_tensors())
    return completed(model, kv_cache_dtype)


def _float_model(
    path: Path,
    dtype: torch.dtype,
    mapping: QConfigMapping | None,
    kv_cache_dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The float model in `path`, quantized as `mapping` says, linear layers while they are read if that is enough."""
    if mapping is None or needs_calibration(mapping):
        return _optimized(load_float_model(path, dtype, trust_remote_code), dtype, mapping, kv_cache_dtype)
    return load_rounded(path, dtype, lambda _: mapping, kv_cache_dtype, trust_remote_code)


def load_rounded(
    path: Path,
    dtype: torch.dtype,
    mapping_of: Callable[[PreTrainedModel], QConfigMapping],
    kv_cache_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The float model in `path`, quantized as `mapping_of` says of it, which needs no calibration, and optimized.

    `path` is a directory or a GGUF file. `mapping_of` gets the model without its weights. Weights that are rounded to
    nearest are so as they are read. Raises ValueError for a model that is quantized already.
    """
    shell, tensors = _float_source(path, trust_remote_code)
    return _rounded_model(shell, tensors, dtype, mapping_of, kv_cache_dtype)


def load_stored(
    path: Path,
    dtype: torch.dtype,
    mapping_of: Callable[[PreTrainedModel], QConfigMapping],
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The float model in `path`, in which each linear layer that `mapping_of` quantizes is a `StoredLinear`.

    `path`, `mapping_of` and errors are those of `load_rounded`.
    """
    shell, tensors = _float_source(path, trust_remote_code)
    return shell.with_layers(dtype, lambda model: plan_storage(model, tensors, mapping_of(model)), tensors)


def load_float(path: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The float model in `path`, a directory or a GGUF file, as transformers has it; raises as `load_rounded`."""
    if find_gguf(path) is None:
        return load_float_model(path, dtype, trust_remote_code)
    shell, tensors = _float_source(path, trust_remote_code)
    return shell.with_layers(dtype, lambda model: FloatPlan({}, {}), tensors)


def _float_source(path: Path, trust_remote_code: bool) -> tuple[_Shell, dict[str, Stored]]:
    """The class, configuration and tensors of the float model in `path`."""
    gguf = find_gguf(path)
    if gguf is None:
        check_float(path)
        return _Shell.of_directory(path, trust_remote_code), open_tensors(path)
    file = open_gguf(gguf)
    kinds = sorted({tensor.kind for tensor in file.tensors.values()} - {""})
    if kinds:
        raise ValueError(
            f"{gguf}: expected a float model, got one that is quantized already, as {', '.join(kinds)}; it runs as it "
            "is, and `ipex-quant convert` writes it in other formats"
        )
    return _Shell.of_gguf(file), dict(open_gguf_checkpoint(file).tensors)


def _rounded_model(
    shell: _Shell,
    tensors: dict[str, Stored],
    dtype: torch.dtype,
    mapping_of: Callable[[PreTrainedModel], QConfigMapping],
    kv_cache_dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model of float `tensors`, whose linear layers are rounded as `mapping_of` says while they are read."""
    mapping: QConfigMapping | None = None

    def plan(model: PreTrainedModel) -> FloatPlan:
        nonlocal mapping
        mapping = mapping_of(model)
        return plan_rounding(model, tensors, mapping)

    model = shell.with_layers(dtype, plan, tensors)
    left, _ = choose_qconfigs(mapping, model)
    if not left and any(isinstance(module, QuantizedModule) for module in model.modules()):
        warn_of_float(model, getattr(model, FLOAT_REASONS))
        return completed(model, kv_cache_dtype)
    return _optimized(model, dtype, mapping, kv_cache_dtype)


def _optimized(
    model: PreTrainedModel, dtype: torch.dtype, mapping: QConfigMapping | None, kv_cache_dtype: torch.dtype | None
) -> PreTrainedModel:
    options = {"quantization_config": mapping, "kv_cache_dtype": kv_cache_dtype}
    return optimize(model, dtype=dtype, inplace=True, **options)
