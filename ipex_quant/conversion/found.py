"""Putting what a weight-only algorithm found into a prepared model."""

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
    """What an algorithm found: quantized weights of linears, and new values of float parameters, by their names."""

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def put_into(self, prepared: nn.Module) -> None:
        """Replace the linears of a model that `prepare` marked, and its parameters, by those found; `convert` it then.

        Each linear computes as its `qconfig` says. A bias of zeros is dropped, as `convert` does.
        """
        for name, value in self.parameters.items():
            owner, _, key = name.rpartition(".")
            old = prepared.get_parameter(name)  # replaced, since a copy's has the memory of the model's
            setattr(prepared.get_submodule(owner), key, nn.Parameter(value.to(old.dtype), old.requires_grad))
        untie(prepared, self.weights)
        swap_modules(prepared, {name: partial(_quantized, weight) for name, weight in self.weights.items()})


def _quantized(weight: QuantizedWeight, linear: nn.Module) -> nn.Module:
    qconfig = linear.qconfig
    bias = linear.bias if linear.bias is not None and linear.bias.any() else None
    new = WeightOnlyQuantizedLinear.from_quantized_weight(weight, bias, qconfig.lowp_mode, qconfig.act_quant_mode)
    return new.to(linear.weight.dtype).train(linear.training)
