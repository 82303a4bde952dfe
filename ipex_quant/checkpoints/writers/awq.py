"""Writing AWQ checkpoints, in the layout "gemm" that `checkpoints/awq.py` describes.

The configuration has one group size for all layers. Zero points are always stored, those of symmetric weights as 8.
Source: AutoAWQ's ``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...numerics.affine import code_offset
from ...numerics.exact_scales import exact_scales
from ...numerics.nibbles import unpack_nibbles
from ...numerics.scheme import WoqWeightDtype
from ..awq import BITS, FIELDS, ORDER
from ..bit_fields import pack_fields
from .writer import CheckpointWriter, Layer, LayerError, check_dtype, check_one_level, most_common

HELD = (WoqWeightDtype.INT4,)
"""Weight dtypes that the format holds."""

_HIGHEST = (1 << BITS) - 1


class AwqWriter(CheckpointWriter):
    """Writes INT4 weights of one group size, with or without zero points, in the natural order of input features."""

    def __init__(self, layers: Sequence[Layer], float_layers: Sequence[str], head: str | None) -> None:
        super().__init__(layers, float_layers, head)
        sizes = {}
        for layer in layers:
            weight = layer.read()
            check_dtype(layer, weight, HELD, 'leave the layer in float, or write format="gptq" or "compressed-tensors"')
            check_one_level(layer, weight, 'leave the layer in float, or write format="gguf"')
            reason = None
            if layer.name == head:
                reason = "it is the output layer, which AWQ's tools keep in float"
            elif weight.g_idx is not None:
                reason = "its groups are in act-order, AWQ's are in the order of the input features"
            elif weight.shape[0] % FIELDS:
                reason = f"AWQ stores {FIELDS} outputs to a word, it has {weight.shape[0]}"
            elif weight.zero_points is not None and weight.zero_points.gt(_HIGHEST).any():
                reason = f"it has a zero point of {_HIGHEST + 1}, AWQ stores 0..{_HIGHEST}"
            if reason is not None:
                raise LayerError(layer.name, f'{reason}; leave the layer in float, or write format="gptq"')
            sizes[layer.name] = weight.scheme.group_size
        self.group_size = most_common(sizes.values())
        other = next((name for name, size in sizes.items() if size != self.group_size), None)
        if other is not None:
            raise LayerError(
                other,
                f"its group size is {sizes[other]}, that of others {self.group_size}, and AWQ has one for all; "
                'quantize with one group size, or write format="gptq"',
            )

    @property
    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.float_layers) or None,
        }

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        weight = layer.read()
        zero_points = weight.zero_points
        if zero_points is None:
            zero_points = torch.full(weight.scales.shape, code_offset(weight.scheme.dtype), dtype=torch.uint8)
        return {
            "qweight": _packed(unpack_nibbles(weight.codes, weight.shape[1])),
            "qzeros": _packed(zero_points.to(torch.uint8)),
            "scales": exact_scales(weight.scales).t().contiguous(),
        }


def _packed(fields: torch.Tensor) -> torch.Tensor:
    """Words int32 ``[M, N / 8]`` of the fields ``[N, M]`` of each output."""
    by_word = fields.t().unflatten(1, (-1, FIELDS))
    return pack_fields(by_word[..., list(ORDER)].flatten(1), BITS)
