"""The header in front of the tiles of a packed weight: ``WoqHeader`` of ``csrc/pack/layout.h``, as Python reads it."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

HEADER_BYTES = 64
_FIELDS = struct.Struct("<Iiqqqii")
_OUT_FEATURES = slice(8, 16)


class WoqHeader(NamedTuple):
    """The fields in their order; `dtype` is a `WoqWeightDtype`, `group_size` -1 for one group a row."""

    magic: int
    dtype: int
    out_features: int
    in_features: int
    group_size: int
    asymmetric: int
    half_scales: int


def read_header(data: torch.Tensor) -> WoqHeader:
    """Return the header of a packed weight's `data`, uint8, of which it takes the first bytes."""
    return WoqHeader(*_FIELDS.unpack(bytes(data[: _FIELDS.size].tolist())))


def header_for(data: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return a copy of the header of `data`, uint8 ``[64]``, that says another number of output features."""
    header = data[:HEADER_BYTES].clone()
    header[_OUT_FEATURES] = torch.tensor([out_features]).view(torch.uint8)
    return header
