"""The blocks of GGUF's quantized tensors, taken apart into codes, scales and minimums; nothing is rounded.

A row is blocks of 32 or 256 elements one after the other. Elements of a nibble layout are not neighbours: the low
halves of a run of bytes are the first elements, the high halves the next. Scales of the "K" types and of IQ4_XS are
small integers times a float16 `d` of their block, which is their super scale. Source: ggml's ``ggml-common.h`` and
``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..numerics.affine import dequantize, plain_codes
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqWeightDtype
from .tensors import e8m0_scales

SLICE_ELEMENTS = 1 << 22
"""Elements that are taken apart at a time: some megabytes of intermediate values."""

Parts = dict[str, torch.Tensor]
"""Of blocks ``[B]``: `codes` uint8 or int8 ``[B, elements]``, `scales` ``[B, groups]``; where a type has them,
`minimums` ``[B, groups]``, `super_scales` and `super_minimums` ``[B, 1]``, all float32."""


@dataclass(frozen=True)
class Blocks:
    """A type of blocks: its `number` in files, `elements` and bytes (`size`) of a block, and what it becomes.

    `dtype` holds the codes, in groups of `group`.
    """

    number: int
    elements: int
    size: int
    dtype: WoqWeightDtype
    group: int
    parts: Callable[[torch.Tensor], Parts]


def read_blocks(kind: str, rows: torch.Tensor) -> QuantizedWeight:
    """The weight ``[N, K]`` of uint8 `rows` ``[N, bytes]`` of blocks; ValueError for scales that are not finite."""
    blocks = BLOCKS[kind]
    count, columns = len(rows), rows.shape[1] // blocks.size * blocks.elements
    whole: Parts = {}
    for start, parts in _slices(blocks, rows):
        codes = parts.pop("codes")
        parts["codes"] = plain_codes(codes, blocks.dtype)
        for name, part in parts.items():
            if name not in whole:
                whole[name] = part.new_empty((count, part.shape[1]))
            whole[name][start : start + len(part)] = part
    raised = "minimums" in whole
    supers = blocks.elements if "super_scales" in whole else None
    scheme = WeightScheme(blocks.dtype, not raised, blocks.group, raised, supers)
    return QuantizedWeight(**whole, zero_points=None, g_idx=None, scheme=scheme, shape=(count, columns))


def float_rows(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """The values of uint8 `rows` ``[N, bytes]`` of blocks, float32 ``[N, K]``."""
    blocks = BLOCKS[kind]
    result = torch.empty(len(rows), rows.shape[1] // blocks.size * blocks.elements, dtype=torch.float32)
    step = _step(blocks, rows)
    for start in range(0, len(rows), step):
        result[start : start + step] = dequantize(read_blocks(kind, rows[start : start + step]))
    return result


def _slices(blocks: Blocks, rows: torch.Tensor) -> Iterator[tuple[int, Parts]]:
    """Parts ``[rows, ...]`` of some rows at a time, with the first row's index."""
    step = _step(blocks, rows)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        parts = blocks.parts(some.reshape(-1, blocks.size))
        yield start, {name: part.reshape(len(some), -1) for name, part in parts.items()}


def _step(blocks: Blocks, rows: torch.Tensor) -> int:
    return max(1, SLICE_ELEMENTS * blocks.size // max(1, rows.shape[1] * blocks.elements))


def _half(raw: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, float32 ``[B, 1]``."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: torch.Tensor, at: int, run: int, runs: int = 1) -> torch.Tensor:
    """Codes of `runs` runs of `run` bytes from `at` on: of each, the low halves and then the high ones."""
    packed = raw[:, at : at + run * runs].reshape(-1, runs, 1, run)
    return torch.cat((packed & 15, packed >> 4), dim=2).flatten(1)


def _bits(raw: torch.Tensor, at: int, count: int, width: int, fields: int) -> torch.Tensor:
    """Fields of `width` bits of `count` bytes from `at` on ``[B, fields, count]``, the lowest of all bytes first."""
    shifts = torch.arange(0, fields * width, width, dtype=torch.uint8)[:, None]
    return (raw[:, None, at : at + count] >> shifts) & ((1 << width) - 1)


def _fifth_bits(raw: torch.Tensor, at: int) -> torch.Tensor:
    """The fifth bit of 32 codes, as 0 or 16, of four bytes."""
    return _bits(raw, at, 4, 1, 8).transpose(1, 2).flatten(1) << 4


def _q4_0(raw: torch.Tensor) -> Parts:
    return {"codes": _nibbles(raw, 2, 16), "scales": _half(raw, 0)}


def _q4_1(raw: torch.Tensor) -> Parts:
    return {"codes": _nibbles(raw, 4, 16), "scales": _half(raw, 0), "minimums": _half(raw, 2)}


def _q5_0(raw: torch.Tensor) -> Parts:
    return {"codes": _nibbles(raw, 6, 16) | _fifth_bits(raw, 2), "scales": _half(raw, 0)}


def _q5_1(raw: torch.Tensor) -> Parts:
    codes = _nibbles(raw, 8, 16) | _fifth_bits(raw, 4)
    return {"codes": codes, "scales": _half(raw, 0), "minimums": _half(raw, 2)}


def _q8_0(raw: torch.Tensor) -> Parts:
    return {"codes": raw[:, 2:34].contiguous().view(torch.int8), "scales": _half(raw, 0)}


def _mxfp4(raw: torch.Tensor) -> Parts:
    return {"codes": _nibbles(raw, 1, 16), "scales": e8m0_scales(raw[:, :1]) / 2}  # codes are doubled


def _q2_k(raw: torch.Tensor) -> Parts:
    codes = torch.cat([_bits(raw, at, 32, 2, 4).flatten(1) for at in (16, 48)], dim=1)
    scales, minimums = (raw[:, :16] & 15).float(), (raw[:, :16] >> 4).float()
    return {"codes": codes, **_scaled(scales, _half(raw, 80)), **_raised(minimums, _half(raw, 82))}


def _q3_k(raw: torch.Tensor) -> Parts:
    low = torch.cat([_bits(raw, at, 32, 2, 4).flatten(1) for at in (32, 64)], dim=1)
    high = _bits(raw, 0, 32, 1, 8).flatten(1)
    scales = torch.cat((raw[:, 96:104] & 15, raw[:, 96:104] >> 4), dim=1)
    scales = scales | _bits(raw, 104, 4, 2, 4).flatten(1) << 4
    return {"codes": low | high << 2, **_scaled(scales.float() - 32, _half(raw, 108))}


def _q4_k(raw: torch.Tensor) -> Parts:
    scales, minimums = _six_bits(raw)
    codes = _nibbles(raw, 16, 32, 4)
    return {"codes": codes, **_scaled(scales, _half(raw, 0)), **_raised(minimums, _half(raw, 2))}


def _q5_k(raw: torch.Tensor) -> Parts:
    scales, minimums = _six_bits(raw)
    codes = _nibbles(raw, 48, 32, 4) | _bits(raw, 16, 32, 1, 8).flatten(1) << 4
    return {"codes": codes, **_scaled(scales, _half(raw, 0)), **_raised(minimums, _half(raw, 2))}


def _q6_k(raw: torch.Tensor) -> Parts:
    low = _nibbles(raw, 0, 64, 2)  # 64 low halves, then 64 high ones, twice
    high = torch.cat([_bits(raw, at, 32, 2, 4).flatten(1) for at in (128, 160)], dim=1)
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return {"codes": low | high << 4, **_scaled(scales, _half(raw, 208))}


def _iq4_xs(raw: torch.Tensor) -> Parts:
    low = _bits(raw, 4, 4, 4, 2).transpose(1, 2).flatten(1)
    high = _bits(raw, 2, 2, 2, 4).transpose(1, 2).flatten(1)
    scales = (low | high << 4).float() - 32
    return {"codes": _nibbles(raw, 8, 16, 8), **_scaled(scales, _half(raw, 0))}


def _six_bits(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and minimums of Q4_K and Q5_K, eight of 6 bits each in twelve bytes."""
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return scales.float(), minimums.float()


def _scaled(integers: torch.Tensor, d: torch.Tensor) -> Parts:
    return {"scales": integers * d, "super_scales": d}


def _raised(integers: torch.Tensor, d: torch.Tensor) -> Parts:
    """Minimums, which files hold as what is subtracted."""
    return {"minimums": integers * -d, "super_minimums": -d}


BLOCKS: Mapping[str, Blocks] = MappingProxyType(
    {
        "Q4_0": Blocks(2, 32, 18, WoqWeightDtype.INT4, 32, _q4_0),
        "Q4_1": Blocks(3, 32, 20, WoqWeightDtype.INT4, 32, _q4_1),
        "Q5_0": Blocks(6, 32, 22, WoqWeightDtype.INT5, 32, _q5_0),
        "Q5_1": Blocks(7, 32, 24, WoqWeightDtype.INT5, 32, _q5_1),
        "Q8_0": Blocks(8, 32, 34, WoqWeightDtype.INT8, 32, _q8_0),
        "Q2_K": Blocks(10, 256, 84, WoqWeightDtype.INT2, 16, _q2_k),
        "Q3_K": Blocks(11, 256, 110, WoqWeightDtype.INT3, 16, _q3_k),
        "Q4_K": Blocks(12, 256, 144, WoqWeightDtype.INT4, 32, _q4_k),
        "Q5_K": Blocks(13, 256, 176, WoqWeightDtype.INT5, 32, _q5_k),
        "Q6_K": Blocks(14, 256, 210, WoqWeightDtype.INT6, 16, _q6_k),
        "IQ4_NL": Blocks(20, 32, 18, WoqWeightDtype.IQ4, 32, _q4_0),
        "IQ4_XS": Blocks(23, 256, 136, WoqWeightDtype.IQ4, 32, _iq4_xs),
        "MXFP4": Blocks(39, 32, 17, WoqWeightDtype.FP4, 32, _mxfp4),
    }
)
"""The types of blocks that are read, by the names that ggml gives them."""
