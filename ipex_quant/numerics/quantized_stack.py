"""`QuantizedStack`: quantized weights of one shape, one for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .affine import feature_groups
from .quantized_weight import QuantizedWeight
from .scheme import WeightScheme


@dataclass(frozen=True)
class QuantizedStack:
    """Quantized weights ``[out_features, in_features]`` of E experts, stacked.

    The tensors are those of `QuantizedWeight` with the expert as first dimension: `codes` ``[E, N, columns]``, `scales`
    and `zero_points` ``[E, N, groups]``, `g_idx` ``[E, K]`` and so on. `shape` is ``(experts, out_features,
    in_features)``. Raises as `QuantizedWeight` does.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    g_idx: torch.Tensor | None
    scheme: WeightScheme
    shape: tuple[int, int, int]
    minimums: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_minimums: torch.Tensor | None = None

    names: ClassVar[tuple[str, ...]] = QuantizedWeight.names

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if tensor.dim() != (2 if name == "g_idx" else 3) or len(tensor) != self.shape[0]:
                raise ValueError(f"{name}: expected those of {self.shape[0]} experts, got shape {list(tensor.shape)}")
        for expert in range(self.shape[0]):
            self[expert]

    @classmethod
    def of(cls, weights: Sequence[QuantizedWeight]) -> QuantizedStack:
        """Stack weights; ValueError unless they have one scheme and shape."""
        first = weights[0]
        for index, weight in enumerate(weights):
            if (weight.scheme, weight.shape) != (first.scheme, first.shape):
                raise ValueError(
                    f"expected experts of one scheme and shape, got {first.scheme} {list(first.shape)} for expert 0, "
                    f"{weight.scheme} {list(weight.shape)} for expert {index}"
                )
        tensors = {name: [getattr(weight, name) for weight in weights] for name in cls.names}
        if any(weight.g_idx is not None for weight in weights):  # an expert's order may happen to be the natural one
            tensors["g_idx"] = [feature_groups(weight).int() for weight in weights]
        stacked: dict[str, Any] = {
            name: None if each[0] is None else torch.stack(each) for name, each in tensors.items()
        }
        return cls(**stacked, scheme=first.scheme, shape=(len(weights), *first.shape))

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """Weight of one expert; its tensors are views of the stack's."""
        tensors: dict[str, Any] = {
            name: None if (t := getattr(self, name)) is None else t[expert] for name in self.names
        }
        return QuantizedWeight(**tensors, scheme=self.scheme, shape=self.shape[1:])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, without those that are None."""
        return {name: tensor for name in self.names if (tensor := getattr(self, name)) is not None}
