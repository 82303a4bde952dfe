"""The header in front of the tiles of a packed weight: ``WoqHeader`` of ``csrc/pack/layout.h``, as Python reads it."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import torch

from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

HEADER_BYTES = 64
_FIELDS = struct.Struct("<Iiqqqiiii")
_OUT_FEATURES = slice(8, 16)


class Offsets(IntEnum):
    """What a group has beside its scale."""

    NONE = 0
    ZERO_POINTS = 1
    MINIMUMS = 2


class WoqHeader(NamedTuple):
    """The fields in their order.

    `dtype` is a `WoqWeightDtype`, `group_size` -1 for one group a row, `offsets` an `Offsets`; `super_groups` is the
    number of groups of a super group, 0 if there are none.
    """

    magic: int
    dtype: int
    out_features: int
    in_features: int
    group_size: int
    offsets: int
    scale_type: int
    super_groups: int
    half_supers: int

    @property
    def scheme(self) -> WeightScheme:
        """The scheme of the weight; one super group is said to be of the row."""
        size = self.super_groups * self.group_size
        return WeightScheme(
            WoqWeightDtype(self.dtype),
            self.offsets == Offsets.NONE,
            self.group_size,
            self.offsets == Offsets.MINIMUMS,
            None if not size else PER_CHANNEL if size >= self.in_features else size,
        )


def offsets_of(scheme: WeightScheme) -> Offsets:
    """What the groups of a scheme have beside their scales."""
    return Offsets.MINIMUMS if scheme.minimums else Offsets.ZERO_POINTS if scheme.has_zero_points else Offsets.NONE


def read_header(data: torch.Tensor) -> WoqHeader:
    """Return the header of a packed weight's `data`, uint8; ValueError for anything else."""
    if data.dtype != torch.uint8 or data.dim() != 1 or len(data) < HEADER_BYTES:
        raise ValueError(f"data: expected bytes of a packed weight, got {data.dtype} {list(data.shape)}")
    return WoqHeader(*_FIELDS.unpack(bytes(data[: _FIELDS.size].tolist())))


def header_for(data: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return a copy of the header of `data`, uint8 ``[64]``, that says another number of output features."""
    header = data[:HEADER_BYTES].clone()
    header[_OUT_FEATURES] = torch.tensor([out_features]).view(torch.uint8)
    return header
