"""`OpContext`: the tensors of a weight-only layer, under the names of IPEX's operator context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class OpContext:
    """Answers what code written for IPEX asks of the ``_op_context`` of a weight-only layer.

    Tensors are plain, those of a `QuantizedWeight`, so that `pack` and `to_public` return what they are given.
    """

    weight: QuantizedWeight
    bias: torch.Tensor | None

    def get_weight(self) -> torch.Tensor:
        """The codes as in `QuantizedWeight`, which say all with scales and zero points unless it has minimums."""
        return self.weight.codes

    def get_weight_shape(self) -> list[int]:
        """``[out_features, in_features]``."""
        return list(self.weight.shape)

    def get_scales(self) -> torch.Tensor:
        """Scales, float32 ``[N, groups]``."""
        return self.weight.scales

    def get_zero_points(self) -> torch.Tensor | None:
        """Zero points, int16 ``[N, groups]``, or None for a symmetric weight, and for one with minimums."""
        return self.weight.zero_points

    def get_g_idx(self) -> torch.Tensor | None:
        """The group of every input feature, int32 ``[K]``, or None where they are in natural order."""
        return self.weight.g_idx

    def get_bias(self) -> torch.Tensor | None:
        """The bias ``[N]``, or None."""
        return self.bias

    def get_cached_weight(self) -> None:
        """None: no second copy of the weight is kept for large batches."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` itself."""
        return weight

    def to_public(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` itself."""
        return weight
