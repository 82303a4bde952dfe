"""Loading a quantized checkpoint through transformers, without float weights of quantized layers at any time.

transformers makes the model on the meta device, and loads, renames and stacks the tensors that are in float. Layers
whose weight the checkpoint holds quantized are taken out meanwhile; then each is read, packed and put in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoints import Checkpoint
from ...conversion.swap import return_freed_memory, successor
from ...conversion.tying import untie
from ...nn.multihead_attention import split_attentions
from .checkpoint import Plan, plan_of

METHOD = "ipex_quant_checkpoint"
"""Name of the method while a model is loaded; no configuration that is saved has it."""

_MANY_LAYERS = 16


class CheckpointSource(QuantizationConfigMixin):
    """The `quantization_config` with which `from_pretrained` takes quantized layers from `checkpoint`.

    `mapping` selects the layers and their compute mode.
    """

    def __init__(self, checkpoint: Checkpoint, mapping: QConfigMapping) -> None:
        self.quant_method = METHOD
        self.checkpoint = checkpoint
        self.mapping = mapping

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointSource:
        return self  # transformers copies configurations; the tensors stay where they are


class CheckpointLoader(HfQuantizer):
    """Replaces the layers of a model on the meta device by those that a `CheckpointSource` holds."""

    quantization_config: CheckpointSource

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        source = self.quantization_config
        with torch.device("cpu"):  # of the trials that tell what layers compute; the model's is meta
            self._plan: Plan = plan_of(model, source.checkpoint, source.mapping)
        split_attentions(model, self._plan.layers)
        untie(model, self._plan.replacements)
        self._empty = {name: model.get_submodule(name) for name in self._plan.replacements}
        for name in self._empty:
            model.set_submodule(name, nn.Identity())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        replacements = self._plan.replacements
        progress = tqdm(replacements.items(), desc="packing", unit="layer", disable=len(replacements) < _MANY_LAYERS)
        for name, make in progress:
            model.set_submodule(name, successor(self._empty.pop(name), make).eval())
            return_freed_memory()
        self._plan.finish(model)
        return model

    def is_serializable(self) -> bool:
        return False  # a loaded model gets a quantizer that is

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Register the method with transformers; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CheckpointSource)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(CheckpointLoader)
