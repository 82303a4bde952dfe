"""The checkpoint format of IPEX's API document: three tensors per module, under names that the user may choose.

For a linear ``[N, K]`` with 4-bit codes and zero points, eight to an int32 word, first in the low bits:

- ``packed_weight`` ``[N, ceil(K / 8)]``, ``scale`` ``[N, groups]``, ``packed_zp`` ``[N, ceil(groups / 8)]``, or
- packed along N (`compression_dim` 0): ``[ceil(N / 8), K]``, ``[N, groups]``, ``[ceil(N / 8), groups]``, or
- GPTQ version 1 tensors under other names: ``[ceil(K / 8), N]``, ``[groups, N]``, ``[groups, ceil(N / 8)]``.

The layout is inferred from the shapes. ``bias`` and ``g_idx`` are optional and as in GPTQ. Source: the
`low_precision_checkpoint` entry of IPEX's API document, and IPEX's ``WeightOnlyLinear`` for `compression_dim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..numerics.nibbles import pack_nibbles
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, WeightScheme, WoqWeightDtype
from .bit_fields import unpack_fields, word_count
from .format import CheckpointFormat
from .gptq import read_gptq
from .tensors import INDEX_DTYPES, check, check_rank, infer_group_size, integer_weight, require, shape_or_stored

BITS = 4


@dataclass(frozen=True)
class IpexDefaultFormat(CheckpointFormat):
    """The names of one module's tensors; the defaults are the API document's."""

    weight_key: str = "packed_weight"
    scale_key: str = "scale"
    zero_point_key: str = "packed_zp"
    bias_key: str = "bias"
    g_idx_key: str = "g_idx"

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors of one module, the weight first."""
        return (self.weight_key, self.zero_point_key, self.scale_key, self.g_idx_key)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> IpexDefaultFormat:
        """The format of a key config such as ``{"weight_key": "qweight", ...}``; ValueError for an unknown key."""
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ValueError(f"checkpoint config: expected only keys of {known}, got {unknown}")
        for key, name in config.items():
            if not isinstance(name, str):
                raise ValueError(f"{key}: expected the name of a tensor, got {name!r}")
        return cls(**config)

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module from its `tensors`.

        Where `shape` has None, the first layout is assumed, with K a multiple of 8. Raises as `read_gptq` does.
        """
        weight, packed_zp, scales = require(tensors, self.keys[:3])
        g_idx = tensors.get(self.g_idx_key)
        check_rank(self.weight_key, weight, 2)
        check_rank(self.scale_key, scales, 2)
        out_features, in_features = shape_or_stored(shape, (scales.shape[0], 8 * weight.shape[1]))
        shape = (out_features, in_features)

        layouts = {
            (out_features, word_count(in_features, BITS), out_features, scales.shape[1]): self._along_k,
            (word_count(out_features, BITS), in_features, out_features, scales.shape[1]): self._along_n,
            (word_count(in_features, BITS), out_features, scales.shape[0], out_features): self._gptq,
        }
        read_layout = layouts.get((*weight.shape, *scales.shape))
        if read_layout is None:
            expected = " or ".join(f"{list(s[:2])} with {self.scale_key} {list(s[2:])}" for s in layouts)
            raise ValueError(
                f"{self.weight_key}: expected shape {expected} for a module {list(shape)}, "
                f"got {list(weight.shape)} with {self.scale_key} {list(scales.shape)}"
            )
        check(self.weight_key, weight, (torch.int32,), tuple(weight.shape))
        check(self.scale_key, scales, FLOAT_DTYPES, tuple(scales.shape))
        if g_idx is not None:
            check(self.g_idx_key, g_idx, INDEX_DTYPES, (in_features,))
        return read_layout(weight, packed_zp, scales, g_idx, shape)

    def _along_k(
        self,
        weight: torch.Tensor,
        packed_zp: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> QuantizedWeight:
        groups = scales.shape[1]
        check(self.zero_point_key, packed_zp, (torch.int32,), (shape[0], word_count(groups, BITS)))
        codes, zero_points = unpack_fields(weight, BITS, shape[1]), unpack_fields(packed_zp, BITS, groups)
        return _int4_weight(codes, zero_points, scales, g_idx, shape)

    def _along_n(
        self,
        weight: torch.Tensor,
        packed_zp: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> QuantizedWeight:
        check(self.zero_point_key, packed_zp, (torch.int32,), (word_count(shape[0], BITS), scales.shape[1]))
        codes, zero_points = (unpack_fields(packed.t(), BITS, shape[0]).t() for packed in (weight, packed_zp))
        return _int4_weight(codes, zero_points, scales, g_idx, shape)

    def _gptq(
        self,
        weight: torch.Tensor,
        packed_zp: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> QuantizedWeight:
        check(self.zero_point_key, packed_zp, (torch.int32,), (scales.shape[0], word_count(shape[0], BITS)))
        tensors = {"qweight": weight, "qzeros": packed_zp, "scales": scales}
        return read_gptq(tensors if g_idx is None else tensors | {"g_idx": g_idx}, BITS, shape=shape)


def _int4_weight(
    codes: torch.Tensor,
    zero_points: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    shape: tuple[int, int],
) -> QuantizedWeight:
    group_size = infer_group_size(shape[1], scales.shape[1])
    scheme = WeightScheme(WoqWeightDtype.INT4, symmetric=False, group_size=group_size)
    return integer_weight(pack_nibbles(codes), scales, zero_points, g_idx, scheme, shape)
