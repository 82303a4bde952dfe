"""`register_with_transformers`: plain `from_pretrained` of other tools' checkpoints, without those tools."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints import Checkpoint, Stored, checkpoint_methods, open_directory, open_gguf, open_gguf_checkpoint
from ..checkpoints.gguf_names import ARCHITECTURES
from ..conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ..numerics.scheme import WoqWeightDtype
from .gguf import correct_config, provisional_config
from .optimization import completed
from .saved.checkpoint import plan_of
from .saved.rounding import FloatPlan
from .saved.streaming import LayerLoader, LayerPlan, LayerSource

METHOD = "ipex_quant_foreign"
"""Name of the method while a model is loaded."""

GGUF = "gguf"
"""The method of GGUF's blocks in safetensors, and transformers' name for GGUF files."""

_IN_TRANSFORMERS = {"bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit")}
"""Methods that transformers divides by their bits."""


def register_with_transformers(methods: Collection[str] | None = None) -> None:
    """Let transformers' `from_pretrained` load checkpoints of these `quant_method`s as `llm.from_pretrained` does.

    `methods` None means all that docs/checkpoints.md lists. With "gguf", so are GGUF files that `from_pretrained` is
    given as `gguf_file`, without the package ``gguf``, unless its `quantization_config` is a
    ``GgufConfig(dequantize=True)``. It holds for the process, and replaces what transformers has for these methods,
    until `unregister_from_transformers`. Raises ValueError for a method that is not read, and warns if "gguf" is named
    where transformers reads GGUF files in a way that cannot be extended.
    """
    known = checkpoint_methods()
    chosen = known if methods is None else methods
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"methods: expected some of {known}, got {unknown}")
    _replace(AUTO_QUANTIZER_MAPPING, METHOD, ForeignLoader)
    for method in chosen:
        for name in _IN_TRANSFORMERS.get(method, (method,)):
            _replace(AUTO_QUANTIZATION_CONFIG_MAPPING, name, ForeignConfig)
    configs = _gguf_configs()
    if GGUF in chosen and configs is not None and GGUF in AUTO_QUANTIZER_MAPPING:
        _replace(AUTO_QUANTIZER_MAPPING, GGUF, GgufLoader)
        for name in ARCHITECTURES:
            if not isinstance(configs.get(name), _GgufConfigEntry):
                configs[name] = _GgufConfigEntry(configs.get(name))
    elif GGUF in chosen and methods is not None:
        warnings.warn(
            "this release of transformers reads GGUF files in a way that cannot be extended, so that "
            "from_pretrained(gguf_file=...) stays as it is; use ipex_quant.llm.from_pretrained(file)",
            stacklevel=2,
        )


def unregister_from_transformers() -> None:
    """Take back what `register_with_transformers` did."""
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, _gguf_configs() or {}):
        for name, found in list(mapping.items()):
            if hasattr(found, "replaced"):  # as no class of transformers
                mapping[name] = found.replaced
                if found.replaced is None:
                    del mapping[name]


def _gguf_configs() -> dict[str, Any] | None:
    """transformers' functions that make configurations out of GGUF files, by architecture; older releases have none."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return None
    return GGUF_CONFIG_ARCHS


def _replace(mapping: dict[str, type], name: str, new: type) -> None:
    """Put a class like `new`, which knows what it replaces, into transformers' `mapping`."""
    old = mapping.get(name)
    if old is None or not issubclass(old, new):
        mapping[name] = type(new.__name__, (new,), {"replaced": old, "__module__": new.__module__})


@dataclass(frozen=True)
class _GgufConfigEntry:
    """Makes the entries of a configuration for transformers, in the place of `replaced`."""

    replaced: Any

    def __call__(self, metadata: dict[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
        config = provisional_config(metadata, tensor_names)
        if config.model_type not in CONFIG_MAPPING_NAMES:
            raise ValueError(
                f"transformers has no {config.model_type} models; use ipex_quant.llm.from_pretrained(file)"
            )
        return config.to_dict()


class ForeignConfig(QuantizationConfigMixin):
    """The `quantization_config` of another tool's checkpoint, whose entries are read with its tensors."""

    replaced: ClassVar[type | None] = None

    def __init__(self, **entries: Any) -> None:
        self.quant_method = METHOD


class _CheckpointLoader(LayerLoader):
    """A `LayerLoader` of a checkpoint that is known when the model is made."""

    replaced: ClassVar[type | None] = None

    def _take(self, checkpoint: Checkpoint, tensors: dict[str, Stored]) -> None:
        """Load the quantized layers of `checkpoint`, and the other `tensors`."""
        mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)

        def plan(model: PreTrainedModel) -> LayerPlan:
            return plan_of(model, checkpoint, mapping) if len(checkpoint) else FloatPlan({}, {})

        self._quantized = bool(len(checkpoint))
        self.quantization_config = LayerSource(plan, tensors)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        return completed(model, None) if self._quantized else model

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Keep the model's experts as they are."""


class ForeignLoader(_CheckpointLoader):
    """Loads the checkpoint whose files transformers found."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        checkpoint = open_directory(Path(kwargs["checkpoint_files"][0]).parent)
        self._take(checkpoint, checkpoint.other_tensors())
        super()._process_model_before_weight_loading(model, **kwargs)
        # transformers would report the tensors of quantized layers as unexpected
        ends = (*checkpoint.format.keys, checkpoint.format.bias_key, *checkpoint.format.unused)
        own = rf"\.({'|'.join(re.escape(end.lstrip('.')) for end in ends)})$"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), own}


class GgufLoader(_CheckpointLoader):
    """Loads the GGUF file that transformers found.

    transformers makes the class by a `provisional_config`. Then it lets the quantizer read the header, where the
    configuration is corrected, and asks it for the tensors.
    """

    _config: PreTrainedConfig

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        if cls.replaced is not None and quantization_config.dequantize:
            return cls.replaced(quantization_config, **kwargs)
        return super().__new__(cls)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        self._config = config
        return config

    def read_header(self, gguf_file: str) -> None:
        file = open_gguf(gguf_file)
        checkpoint = open_gguf_checkpoint(file)
        correct_config(self._config, file)
        self._take(checkpoint, checkpoint.other_tensors())

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if dtype is None else dtype

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Stored]:
        return self.quantization_config.tensors
