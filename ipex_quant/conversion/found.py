"""`FoundWeights`: put the results of a weight-only algorithm into a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..nn import QuantizedEmbedding, WeightOnlyQuantizedLinear
from ..nn.embeddings import is_embedding
from ..numerics.quantized_weight import QuantizedWeight
from .swap import swap_modules
from .tying import share_tables, tied_modules, untie


@dataclass(frozen=True)
class FoundWeights:
    """The results of an algorithm: quantized weights of linears and embeddings, and new values of float parameters.

    Both are by name.
    """

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def put_into(self, prepared: nn.Module) -> None:
        """Replace modules and parameters of a model that `prepare` marked, in place; then `convert` the model.

        The `qconfig` of a linear sets its compute mode. A bias of zeros is dropped, and equal weights of tied modules
        are shared, as in `convert`.
        """
        for name, value in self.parameters.items():
            owner, _, key = name.rpartition(".")
            old = prepared.get_parameter(name)  # replaced, not written: the model it was copied from has its memory
            setattr(prepared.get_submodule(owner), key, nn.Parameter(value.to(old.dtype), old.requires_grad))
        ties = tied_modules(prepared, self.weights)
        untie(prepared, self.weights)
        replacements = {
            name: partial(
                QuantizedEmbedding.replacing
                if is_embedding(prepared.get_submodule(name))
                else WeightOnlyQuantizedLinear.replacing,
                qw=weight,
            )
            for name, weight in self.weights.items()
        }
        swap_modules(prepared, replacements)
        share_tables(prepared, ties)
