"""How a weight is quantized (`WeightScheme`), and the precision of its matmuls (`WoqLowpMode`, `WoqActQuantMode`).

The enumerations keep IPEX's names and integer values, so that code and configurations written for it stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the activations and float weights that this package computes with."""


class WoqWeightDtype(IntEnum):
    """Storage type of a quantized weight: integers, or codes of a table of values.

    NF4 is QLoRA's NormalFloat, FP8 float8 e4m3, FP4 E2M1 (OCP Microscaling Formats 1.0), IQ4 the table of GGUF's IQ4_NL
    and IQ4_XS, BNB_FP4 that of bitsandbytes' FP4. IPEX has the first four.
    """

    INT8 = 1
    INT4 = 2
    NF4 = 3
    FP8 = 4
    INT2 = 5
    INT3 = 6
    INT5 = 7
    INT6 = 8
    FP4 = 9
    IQ4 = 10
    BNB_FP4 = 11

    @property
    def has_integers(self) -> bool:
        """Whether codes are integers, which zero points and minimums go with."""
        return self.name.startswith("INT")

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers themselves, neither integers nor places in a table."""
        return self.name.startswith("FP8")

    @property
    def fits_int8(self) -> bool:
        """Whether the values of codes are of int8, which INT8 compute multiplies; else it restores the activations."""
        return not self.is_float and self != WoqWeightDtype.BNB_FP4

    @property
    def bits(self) -> int:
        """Bits of a code in a packed weight."""
        return int(self.name[-1])


class WoqWeightQScheme(IntEnum):
    """Whether a weight has zero points; UNDEFINED leaves the choice to the mapping's rule."""

    UNDEFINED = 0
    ASYMMETRIC = 1
    SYMMETRIC = 2


class WoqLowpMode(IntEnum):
    """Compute mode: the lowest precision a kernel may compute in. NONE is the activation's own dtype."""

    NONE = 0
    FP16 = 1
    BF16 = 2
    INT8 = 3


class WoqActQuantMode(IntEnum):
    """How activations are quantized when the compute mode is INT8.

    One scale covers the whole tensor (PER_TENSOR), a block of input channels over all rows (PER_IC_BLOCK), a row
    (PER_BATCH), or a block of input channels of one row (PER_BATCH_IC_BLOCK). The ``_SYM`` modes have no zero point.
    """

    NONE = -1
    PER_TENSOR = 0
    PER_IC_BLOCK = 1
    PER_BATCH = 2
    PER_BATCH_IC_BLOCK = 3
    PER_TENSOR_SYM = 4
    PER_IC_BLOCK_SYM = 5
    PER_BATCH_SYM = 6
    PER_BATCH_IC_BLOCK_SYM = 7


PER_CHANNEL = -1
"""`group_size` of one group per row, that is, per output channel."""


def check_group_size(group_size: int) -> None:
    """Raise TypeError unless `group_size` is an int, ValueError unless it is -1 (per channel) or a power of two."""
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size: expected an int, got {group_size!r}")
    if group_size != PER_CHANNEL and (group_size <= 0 or group_size & (group_size - 1)):
        raise ValueError(f"group_size: expected -1 (per channel) or a positive power of 2, got {group_size}")


@dataclass(frozen=True)
class WeightScheme:
    """How one weight matrix is quantized.

    `symmetric` weights have no zero points; those that are no integers are always symmetric. `group_size` counts input
    features that share one scale; -1 is one scale per output channel. With `minimums` the value of code 0 is a float of
    each group, in place of zero points. With `super_group_size`, scales (and minimums) are stored as bytes times a
    float for so many input features, or all of a row if that is -1. Raises TypeError for a `group_size` that is no int,
    ValueError for a combination that does not exist.
    """

    dtype: WoqWeightDtype = WoqWeightDtype.INT8
    symmetric: bool = True
    group_size: int = PER_CHANNEL
    minimums: bool = False
    super_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in WoqWeightDtype.__members__.values():
            raise ValueError(f"dtype: expected one of {[d.name for d in WoqWeightDtype]}, got {self.dtype!r}")
        object.__setattr__(self, "dtype", WoqWeightDtype(self.dtype))
        check_group_size(self.group_size)
        if not self.symmetric and not self.dtype.has_integers:
            raise ValueError(f"symmetric: {self.dtype.name} weights have no zero points, expected True, got False")
        if self.minimums and self.symmetric:
            raise ValueError("minimums: symmetric weights have none, expected False, got True")
        if self.super_group_size is not None:
            check_group_size(self.super_group_size)
            if PER_CHANNEL != self.super_group_size < self.group_size or self.group_size == PER_CHANNEL:
                raise ValueError(
                    f"super_group_size: expected one or more groups of {self.group_size}, got {self.super_group_size}"
                )

    def group_count(self, in_features: int) -> int:
        """Number of groups along `in_features`; the last one may be ragged."""
        return 1 if self.group_size == PER_CHANNEL else -(-in_features // self.group_size)

    def super_count(self, in_features: int) -> int:
        """Number of super groups along `in_features`; ValueError unless they are of one size."""
        size = in_features if self.super_group_size == PER_CHANNEL else self.super_group_size
        if not size or in_features % size:
            raise ValueError(f"super_group_size: expected a divisor of {in_features} input features, got {size}")
        return in_features // size

    @property
    def has_zero_points(self) -> bool:
        """Whether a weight has zero points."""
        return not self.symmetric and not self.minimums

    @property
    def qscheme(self) -> WoqWeightQScheme:
        """`symmetric` as the enumeration that `QConfigWoq` has."""
        return WoqWeightQScheme.SYMMETRIC if self.symmetric else WoqWeightQScheme.ASYMMETRIC

    def __str__(self) -> str:
        granularity = "per-channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        kind = "sym" if self.symmetric else "min" if self.minimums else "asym"
        text = f"{self.dtype.name.lower()} {kind} {granularity}"
        if self.super_group_size is None:
            return text
        return text + (" in rows" if self.super_group_size == PER_CHANNEL else f" in g{self.super_group_size}")


class QConfigWoq(NamedTuple):
    """How the weight of a linear layer is quantized, and the precision of its matmuls.

    `activation` and `weight` are placeholders for the fields of torch's QConfig; `cache_weight_for_large_batch` has no
    effect and is kept for old code: the kernels need no second copy of a weight. `scale_dtype` is what the scales of
    weights that are rounded to nearest can be held in: float32, or float16 where that has them as normal numbers.
    """

    activation: Any
    weight: Any
    lowp_mode: WoqLowpMode
    act_quant_mode: WoqActQuantMode
    weight_dtype: WoqWeightDtype
    group_size: int
    cache_weight_for_large_batch: bool
    weight_qscheme: WoqWeightQScheme
    scale_dtype: torch.dtype = torch.float32

    @property
    def scheme(self) -> WeightScheme:
        """The `WeightScheme` of the weight."""
        return WeightScheme(self.weight_dtype, self.weight_qscheme == WoqWeightQScheme.SYMMETRIC, self.group_size)
