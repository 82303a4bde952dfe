"""`register_with_transformers`: plain `from_pretrained` of other tools' checkpoints, without those tools."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints import checkpoint_methods, open_directory
from ..conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ..numerics.scheme import WoqWeightDtype
from .optimization import completed
from .saved.checkpoint import plan_of
from .saved.streaming import LayerLoader, LayerSource

METHOD = "ipex_quant_foreign"
"""Name of the method while a model is loaded."""

_IN_TRANSFORMERS = {"bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit")}
"""Methods that transformers divides by their bits."""


def register_with_transformers(methods: Collection[str] | None = None) -> None:
    """Let transformers' `from_pretrained` load checkpoints of these `quant_method`s as `llm.from_pretrained` does.

    `methods` None means all that docs/checkpoints.md lists. It holds for the process, and replaces what transformers
    has for these methods. Raises ValueError for a method that is not read.
    """
    known = checkpoint_methods()
    methods = known if methods is None else methods
    unknown = sorted(set(methods) - set(known))
    if unknown:
        raise ValueError(f"methods: expected some of {known}, got {unknown}")
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(ForeignLoader)
    for method in methods:
        for name in _IN_TRANSFORMERS.get(method, (method,)):
            AUTO_QUANTIZATION_CONFIG_MAPPING[name] = ForeignConfig


class ForeignConfig(QuantizationConfigMixin):
    """The `quantization_config` of another tool's checkpoint, whose entries are read with its tensors."""

    def __init__(self, **entries: Any) -> None:
        self.quant_method = METHOD


class ForeignLoader(LayerLoader):
    """A `LayerLoader` of the checkpoint whose files transformers found."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        checkpoint = open_directory(Path(kwargs["checkpoint_files"][0]).parent)
        mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
        self.quantization_config = LayerSource(
            lambda each: plan_of(each, checkpoint, mapping), checkpoint.other_tensors()
        )
        super()._process_model_before_weight_loading(model, **kwargs)
        # transformers would report the tensors of quantized layers as unexpected
        ends = (*checkpoint.format.keys, checkpoint.format.bias_key, *checkpoint.format.unused)
        own = rf"\.({'|'.join(re.escape(end.lstrip('.')) for end in ends)})$"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), own}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return completed(super()._process_model_after_weight_loading(model, **kwargs), None)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Keep the model's experts as they are."""
