"""Plans for the linear layers of a float model that is quantized while it is loaded, or after.

`plan_rounding` rounds weights to nearest as they are read, one after the other. `plan_storage` leaves them in their
files, for algorithms that go through the model block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import PreTrainedModel

from ... import ops
from ...checkpoints import Stored, WeightsInMemory
from ...conversion.prepare import FLOAT_REASONS
from ...conversion.rules import choose_qconfigs, fit_reasons
from ...nn import WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear
from ...nn.linears import holds_experts
from ...nn.stacked_experts import expert_layout, experts_obstacle
from ...nn.stored_linear import StoredLinear
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import QConfigWoq
from .checkpoint_experts import expert_shapes, experts_from_checkpoint
from .checkpoint_names import model_names


@dataclass(frozen=True)
class FloatPlan:
    """Which layers of a float model are replaced while it is loaded, and why others stay in float, if that is known."""

    replacements: Mapping[str, Callable[[nn.Module], nn.Module]]
    sizes: Mapping[str, int]
    reasons: dict[str, str] | None = None

    @property
    def layers(self) -> set[str]:
        """Names of the layers that are replaced."""
        return set(self.replacements)

    def finish(self, model: nn.Module) -> None:
        """Note why layers of `model` stay in float."""
        if self.reasons is not None:
            setattr(model, FLOAT_REASONS, self.reasons)


def plan_rounding(model: PreTrainedModel, tensors: dict[str, Stored], mapping: QConfigMapping) -> FloatPlan:
    """The `FloatPlan` for `model` on the meta device, that rounds the linear layers that `mapping` makes weight-only.

    The tensors of these layers are taken out of `tensors`, so that nobody else reads them. Layers that share their
    weight, or whose tensors the file stores otherwise than the model, are left to `optimize`.
    """
    chosen, reasons = choose_qconfigs(mapping, model, read_weights=False)
    weight_only = {name: qconfig for name, qconfig in chosen.items() if isinstance(qconfig, QConfigWoq)}
    names = model_names(model, tensors)
    taken = _taken(model, tensors, weight_only, names)
    replacements = {name: partial(_rounded, own, weight_only[name]) for name, own in taken.items()}
    experts = _taken_experts(model, tensors, weight_only, names)
    replacements |= {name: partial(_rounded_experts, own, name, weight_only[name]) for name, own in experts.items()}
    return FloatPlan(replacements, _sizes(taken | experts), fit_reasons(reasons, model))


def plan_storage(model: PreTrainedModel, tensors: dict[str, Stored], mapping: QConfigMapping) -> FloatPlan:
    """The `FloatPlan` for `model` that makes a `StoredLinear` of each linear layer that `mapping` quantizes.

    `tensors` and exceptions are those of `plan_rounding`.
    """
    chosen, _ = choose_qconfigs(mapping, model, read_weights=False)
    taken = _taken(model, tensors, chosen, model_names(model, tensors))
    return FloatPlan({name: partial(_stored, own) for name, own in taken.items()}, dict.fromkeys(taken, 0))


def _taken(
    model: PreTrainedModel, tensors: dict[str, Stored], chosen: Collection[str], names: Mapping[str, str]
) -> dict[str, dict[str, Stored]]:
    """The tensors of each linear layer of `chosen` that has its own in the file; they are taken out of `tensors`.

    `names` are those of `model_names`.
    """
    modules = dict(model.named_modules())
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    taken = {}
    for name in chosen:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            continue
        parameters = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        stored = {key: names.get(f"{name}.{key}", "") for key in parameters}
        fits = all(key in tensors and tensors[key].shape == parameters[own].shape for own, key in stored.items())
        if fits and tied.isdisjoint(f"{name}.{key}" for key in parameters):
            taken[name] = {key: tensors.pop(stored[key]) for key in parameters}
    return taken


def _taken_experts(
    model: PreTrainedModel, tensors: dict[str, Stored], chosen: Collection[str], names: Mapping[str, str]
) -> dict[str, dict[str, Stored]]:
    """The weights of all experts, by name, of each module of `chosen` that stacks them, where the file has them singly.

    They are taken out of `tensors`. Experts with biases are left.
    """
    taken = {}
    for name in chosen:
        module = model.get_submodule(name)
        layout = expert_layout(module) if holds_experts(module) and experts_obstacle(module) is None else None
        if layout is None or layout.biased:
            continue
        shapes = expert_shapes(name, module)
        stored = {each: names.get(f"{each}.weight", "") for each in shapes}
        if all(key in tensors and tuple(tensors[key].shape) == shapes[each] for each, key in stored.items()):
            taken[name] = {each: tensors.pop(key) for each, key in stored.items()}
    return taken


def _sizes(taken: Mapping[str, Mapping[str, Stored]]) -> dict[str, int]:
    """Bytes in the files of the tensors of each layer."""
    return {
        name: sum(stored.shape.numel() * stored.dtype.itemsize for stored in own.values())
        for name, own in taken.items()
    }


def _rounded(tensors: Mapping[str, Stored], qconfig: Any, module: nn.Module) -> nn.Module:
    for key, stored in tensors.items():
        dtype = module.get_parameter(key).dtype
        setattr(module, key, nn.Parameter(stored[...].to(dtype), requires_grad=False))
    module.qconfig = qconfig
    return WeightOnlyQuantizedLinear.from_float(module)


class _RoundedWeights(Mapping[str, QuantizedWeight]):
    """Weights by name that are read, and rounded to nearest, when they are asked for."""

    def __init__(self, stored: Mapping[str, Stored], qconfig: QConfigWoq, dtype: torch.dtype) -> None:
        self._stored, self._qconfig, self._dtype = stored, qconfig, dtype

    def __getitem__(self, name: str) -> QuantizedWeight:
        weight = _read(self._stored[name], self._dtype)
        return ops.quantize_weight(weight, self._qconfig.scheme, self._qconfig.scale_dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _rounded_experts(
    stored: Mapping[str, Stored], name: str, qconfig: QConfigWoq, module: nn.Module
) -> WeightOnlyQuantizedExperts:
    weights = _RoundedWeights(stored, qconfig, module.get_parameter("down_proj").dtype)
    return experts_from_checkpoint(WeightsInMemory(weights), name, qconfig, module)


def _stored(tensors: Mapping[str, Stored], module: nn.Linear) -> StoredLinear:
    dtype = module.weight.dtype
    bias = tensors.get("bias")
    return StoredLinear(
        module,
        partial(_read, tensors["weight"], dtype),
        None if bias is None else _read(bias, module.get_parameter("bias").dtype),
    )


def _read(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    return stored[...].to(dtype)
