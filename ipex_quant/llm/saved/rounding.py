"""`plan_rounding`: quantize linear layers by rounding to nearest while a float model is loaded, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import PreTrainedModel

from ...checkpoints import Stored
from ...conversion.prepare import FLOAT_REASONS
from ...conversion.rules import choose_qconfigs, fit_reasons
from ...nn import WeightOnlyQuantizedLinear
from ...numerics.scheme import QConfigWoq
from .checkpoint_names import model_names


@dataclass(frozen=True)
class RoundingPlan:
    """Which layers of a float model are rounded while it is loaded, and why others stay in float."""

    replacements: Mapping[str, Callable[[nn.Module], nn.Module]]
    reasons: dict[str, str]

    @property
    def layers(self) -> set[str]:
        """Names of the layers that are replaced."""
        return set(self.replacements)

    def finish(self, model: nn.Module) -> None:
        """Note why layers of `model` stay in float."""
        setattr(model, FLOAT_REASONS, self.reasons)


def plan_rounding(model: PreTrainedModel, tensors: dict[str, Stored], mapping: QConfigMapping) -> RoundingPlan:
    """The `RoundingPlan` for `model` on the meta device, for the linear layers that `mapping` quantizes weight-only.

    The tensors of these layers are taken out of `tensors`, so that nobody else reads them. Layers that share their
    weight, or whose tensors the file stores otherwise than the model, are left to `optimize`.
    """
    chosen, reasons = choose_qconfigs(mapping, model, read_weights=False)
    names = model_names(model, tensors)
    modules = dict(model.named_modules())
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    replacements = {}
    for name, qconfig in chosen.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear) or not isinstance(qconfig, QConfigWoq):
            continue
        parameters = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        stored = {key: names.get(f"{name}.{key}", "") for key in parameters}
        fits = all(key in tensors and tensors[key].shape == parameters[own].shape for own, key in stored.items())
        if fits and tied.isdisjoint(f"{name}.{key}" for key in parameters):
            own = {key: tensors.pop(stored[key]) for key in parameters}
            replacements[name] = partial(_rounded, own, qconfig)
    return RoundingPlan(replacements, fit_reasons(reasons, model))


def _rounded(tensors: Mapping[str, Stored], qconfig: Any, module: nn.Module) -> nn.Module:
    for key, stored in tensors.items():
        dtype = module.get_parameter(key).dtype
        setattr(module, key, nn.Parameter(stored[...].to(dtype), requires_grad=False))
    module.qconfig = qconfig
    return WeightOnlyQuantizedLinear.from_float(module)
