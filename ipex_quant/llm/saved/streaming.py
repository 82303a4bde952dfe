"""Loading a model through transformers, without the float weights of layers that are quantized.

transformers makes the model on the meta device, and loads, renames and stacks the tensors that stay in float. Layers
that are quantized, in the file or here, are taken out meanwhile; then each is read, packed and put in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn
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

from ...checkpoints import Stored
from ...conversion.swap import return_freed_memory, successor
from ...conversion.tying import untie
from ...nn import Placeholder
from ...nn.multihead_attention import split_attentions
from .checkpoint_experts import stack_float_experts

METHOD = "ipex_quant_checkpoint"
"""Name of the method while a model is loaded; no configuration that is saved has it."""

_MANY_LAYERS = 16

_COMPUTED_ELEMENTS = 1 << 26
"""Elements of parameters that a model may compute, beside those that it reads."""

_KEPT_BYTES = 1 << 27
"""Bytes read before freed memory goes back to the system: to fault it in again for each layer takes a third of the
time."""

_WORKERS = 2
"""Layers that are made at a time: one is read while another is packed."""


class LayerPlan(Protocol):
    """Which layers are replaced, by functions of the old ones, and what is to be done at the end.

    `sizes` gives the bytes that each function reads.
    """

    @property
    def replacements(self) -> Mapping[str, Callable[[nn.Module], nn.Module]]: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def finish(self, model: nn.Module) -> None: ...


class LayerSource(QuantizationConfigMixin):
    """The `quantization_config` with which `from_pretrained` takes layers from elsewhere, as `plan` says of a model.

    `tensors` are those of the other layers.
    """

    def __init__(self, plan: Callable[[PreTrainedModel], LayerPlan], tensors: dict[str, Stored]) -> None:
        self.quant_method = METHOD
        self.plan, self.tensors = plan, tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSource:
        return self  # transformers copies configurations; the tensors stay where they are


def check_room(model: PreTrainedModel, tensors: Mapping[str, Stored], what: str = "elements") -> None:
    """ValueError if `model`, on the meta device, has far more elements, called `what`, than `tensors`.

    transformers makes those that are missing, or have another shape, before it tells.
    """
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    own = (*model.named_parameters(), *model.named_buffers())
    needed = sum(tensor.numel() for name, tensor in own if name not in tied)
    stored = sum(tensor.shape.numel() for tensor in tensors.values())
    if needed > 2 * stored + _COMPUTED_ELEMENTS:
        raise ValueError(
            f"the configuration describes a {type(model).__name__} with {needed} {what}, of which the "
            f"checkpoint has {stored}; get a complete one, with its own configuration"
        )


class LayerLoader(HfQuantizer):
    """Replaces the layers of a model on the meta device by those of a `LayerSource`."""

    quantization_config: LayerSource

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        with torch.device("cpu"):  # of the trials that tell what layers compute; the model's is meta
            self._plan = self.quantization_config.plan(model)
        names = set(self._plan.replacements)
        split_attentions(model, names)
        untie(model, names)
        for name in names:
            place = Placeholder((), {}, {})
            place.stand_for(model.get_submodule(name))
            model.set_submodule(name, place)
        tensors = self.quantization_config.tensors
        stacked = stack_float_experts(model, tensors)
        tensors.clear()  # the dictionary that transformers reads
        tensors.update(stacked)
        check_room(model, tensors, "elements in tensors that are not quantized")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        replacements, sizes = self._plan.replacements, self._plan.sizes
        hidden = len(replacements) < _MANY_LAYERS or not any(sizes.values())
        with tqdm(total=sum(sizes.values()), desc="packing", unit="B", unit_scale=True, disable=hidden) as progress:
            kept = 0
            for name, layer in made_ahead(model, replacements):
                model.set_submodule(name, layer.eval())
                progress.update(sizes[name])
                kept += sizes[name]
                if kept > _KEPT_BYTES:
                    return_freed_memory()
                    kept = 0
        return_freed_memory()
        self._plan.finish(model)
        if not replacements:  # a float model, which is saved as one
            self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False  # a loaded model gets a quantizer that is

    @property
    def is_trainable(self) -> bool:
        return False


def made_ahead(
    model: nn.Module, replacements: Mapping[str, Callable[[nn.Module], nn.Module]]
) -> Iterator[tuple[str, nn.Module]]:
    """The successors of the layers by name, in order; while one is put in, `_WORKERS` others are made."""

    def made(name: str) -> nn.Module:
        with torch.no_grad():  # a mode of the calling thread alone
            return successor(model.get_submodule(name).float_module, replacements[name])

    names = iter(replacements)
    with ThreadPoolExecutor(_WORKERS) as workers:
        ahead = deque((name, workers.submit(made, name)) for name in islice(names, _WORKERS))
        while ahead:
            name, layer = ahead.popleft()
            done = layer.result()
            ahead.extend((each, workers.submit(made, each)) for each in islice(names, 1))
            yield name, done


def register() -> None:
    """Register the method with transformers; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LayerSource)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LayerLoader)
