"""`FoundWeights`: put the results of a weight-only algorithm into a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..nn import WeightOnlyQuantizedLinear
from ..numerics.quantized_weight import QuantizedWeight
from .swap import swap_modules
from .tying import untie


@dataclass(frozen=True)
class FoundWeights:
    """The results of an algorithm: quantized weights of linears, and new values of float parameters, by name."""

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def put_into(self, prepared: nn.Module) -> None:
        """Replace linears and parameters of a model that `prepare` marked, in place; then `convert` the model.

        The `qconfig` of a linear sets its compute mode. A bias of zeros is dropped, as in `convert`.
        """
        for name, value in self.parameters.items():
            owner, _, key = name.rpartition(".")
            old = prepared.get_parameter(name)  # replaced, not written: the model it was copied from has its memory
            setattr(prepared.get_submodule(owner), key, nn.Parameter(value.to(old.dtype), old.requires_grad))
        untie(prepared, self.weights)
        replacements = {
            name: partial(WeightOnlyQuantizedLinear.replacing, qw=weight) for name, weight in self.weights.items()
        }
        swap_modules(prepared, replacements)
