"""Codebooks: the real values that the codes of a non-uniform weight dtype stand for."""

from __future__ import annotations

import torch

from .intervals import Intervals
from .scheme import WoqWeightDtype

NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float32,
    device="cpu",
)
"""The 16 NormalFloat levels, float32, ascending (QLoRA, arXiv 2305.14314, appendix E; values as in bitsandbytes)."""

FP8_MAX = 448.0
"""Largest finite float8 e4m3fn value (OCP 8-bit floating point specification)."""

E2M1_DOUBLED = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8, device="cpu")
"""Twice the values of the 4-bit floats E2M1, int8, by code (OCP Microscaling Formats 1.0, FP4)."""

IQ4_VALUES = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8, device="cpu"
)
"""The 16 values of GGUF's IQ4_NL and IQ4_XS, int8, ascending."""

BNB_FP4_VALUES = torch.tensor(
    [0, 1, 128, 192, 64, 96, 32, 48, 0, -1, -128, -192, -64, -96, -32, -48], dtype=torch.int16, device="cpu"
)
"""The values of bitsandbytes' FP4 times 192, which makes them integers, int16, by code."""

CODEBOOKS = {
    WoqWeightDtype.NF4: NF4_LEVELS,
    WoqWeightDtype.FP4: E2M1_DOUBLED.float(),
    WoqWeightDtype.IQ4: IQ4_VALUES.float(),
    WoqWeightDtype.BNB_FP4: BNB_FP4_VALUES.float(),
}
"""Float32 values of the codes of each dtype that has a table."""


def _intervals(levels: torch.Tensor) -> Intervals:
    return Intervals((levels[1:] + levels[:-1]) / 2)


_MAGNITUDES = {dtype: CODEBOOKS[dtype][:8].sort() for dtype in (WoqWeightDtype.FP4, WoqWeightDtype.BNB_FP4)}
"""Of tables whose upper half is the lower one with a minus: the magnitudes, ascending, and their codes."""

_NEAREST = {
    dtype: _intervals(_MAGNITUDES[dtype].values if dtype in _MAGNITUDES else levels)
    for dtype, levels in CODEBOOKS.items()
}
"""The values that round to each level or magnitude."""


def nearest_codes(values: torch.Tensor, dtype: WoqWeightDtype) -> torch.Tensor:
    """Codes, int32, of the entries of the table of `dtype` that are nearest to float `values`, ties to lower ones."""
    if dtype not in _MAGNITUDES:
        return _NEAREST[dtype].index(values)
    codes = code_levels(_NEAREST[dtype].index(values.abs()), _MAGNITUDES[dtype].indices.int())
    return codes | values.signbit().int() << 3


def code_levels(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The entries of the table `levels` that `codes`, of any integer dtype and shape, stand for."""
    return levels.index_select(0, codes.reshape(-1).int()).view(codes.shape)  # a fourth of the time of levels[codes]
