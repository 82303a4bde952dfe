"""`QuantizedWeight`: the plain, ISA-independent form of one quantized weight matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype


def code_dtype(dtype: WoqWeightDtype) -> torch.dtype:
    """torch dtype that holds the codes of a weight dtype."""
    return {WoqWeightDtype.INT8: torch.int8, WoqWeightDtype.FP8: torch.float8_e4m3fn}.get(dtype, torch.uint8)


def zero_point_range(dtype: WoqWeightDtype) -> tuple[int, int]:
    """Lowest and highest zero point of an integer dtype.

    It is the range of the codes, and below 8 bits one more, which version 1 GPTQ files may hold.
    """
    return (-128, 127) if dtype == WoqWeightDtype.INT8 else (0, 1 << dtype.bits)


def code_columns(dtype: WoqWeightDtype, in_features: int) -> int:
    """Second dimension of `codes`: bytes (or elements) that one row of `in_features` codes takes."""
    return (in_features + 1) // 2 if dtype.bits <= 4 else in_features


Place = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


def tensor_places(scheme: WeightScheme, shape: tuple[int, int], act_order: bool) -> dict[str, Place | None]:
    """Dtype and shape of each tensor of a `QuantizedWeight`, by name; None for those that the scheme has not."""
    rows, columns = shape
    grid = (rows, scheme.group_count(columns))
    supers = scheme.super_group_size is not None
    super_grid = (rows, scheme.super_count(columns)) if supers else grid
    return {
        "codes": (code_dtype(scheme.dtype), (rows, code_columns(scheme.dtype, columns))),
        "scales": (torch.float32, grid),
        "zero_points": (torch.int16, grid) if scheme.has_zero_points else None,
        "g_idx": (torch.int32, (columns,)) if act_order else None,
        "minimums": (torch.float32, grid) if scheme.minimums else None,
        "super_scales": (torch.float32, super_grid) if supers else None,
        "super_minimums": (torch.float32, super_grid) if supers and scheme.minimums else None,
    }


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight ``[out_features, in_features]``: ``w = (codes - zero_points) * scales + minimums``.

    - `codes`: up to 4 bits uint8 ``[N, ceil(K / 2)]``, even k in the low nibble and, with an odd K, 0 in the last high
      one; else ``[N, K]``, int8 (INT8), float8_e4m3fn (FP8) or uint8. Integers below 8 bits are unsigned, a symmetric
      one stands for ``code - 2 ** (bits - 1)``; others are indices of the values in `codebooks`.
    - `scales`: float32 ``[N, groups]``.
    - `zero_points`: int16 ``[N, groups]`` within `zero_point_range`, or None when the scheme has none.
    - `g_idx`: int32 ``[K]``, the group of every input feature (act-order), or None when feature k is in group
      ``k // group_size``. It reorders the features; the groups keep their sizes.
    - `scheme`, and `shape`, the logical ``(out_features, in_features)``.
    - `minimums`: float32 ``[N, groups]``, or None when the scheme has none.
    - `super_scales`, `super_minimums`: float32 ``[N, supers]``, or None; with them a scale (minimum) is that of its
      super group times an integer in -128..127, or all scales are float8 e4m3 numbers times it. Packed weights then
      hold a byte for each scale; everything else reads the products in `scales` and `minimums`.

    Raises ValueError or TypeError when the tensors do not fit the scheme and the shape, or hold invalid values: a float
    that is not finite, a zero point or a code out of range.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    g_idx: torch.Tensor | None
    scheme: WeightScheme
    shape: tuple[int, int]
    minimums: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_minimums: torch.Tensor | None = None

    names: ClassVar[tuple[str, ...]] = (
        *("codes", "scales", "zero_points", "g_idx"),
        *("minimums", "super_scales", "super_minimums"),
    )
    """Names of the tensors."""

    def __post_init__(self) -> None:
        for name, place in tensor_places(self.scheme, self.shape, self.g_idx is not None).items():
            tensor = getattr(self, name)
            if (tensor is None) != (place is None):
                raise ValueError(f"{name}: a {self.scheme} weight must {'not ' if place is None else ''}have them")
            if tensor is not None and place is not None:
                check_tensor(name, tensor, (place[0],), place[1])
                if tensor.dtype == torch.float32 and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{name}: expected finite values, got NaN or Inf; check where the weight comes from"
                    )
        dtype = self.scheme.dtype
        if self.zero_points is not None:
            _check_zero_points(self.zero_points, dtype)
        if dtype == WoqWeightDtype.FP8 and self.codes.isnan().any():
            raise ValueError("codes: expected finite FP8 values, got NaN; check where the weight comes from")
        if dtype.bits not in (4, 8):
            _check_codes(self.codes, dtype.bits)
        if self.g_idx is not None:
            _check_group_order(self.g_idx, self.scheme)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, without those that are None."""
        return {name: tensor for name in self.names if (tensor := getattr(self, name)) is not None}

    def select(self, rows: torch.Tensor | slice) -> QuantizedWeight:
        """The weight of some output features, given as indices or a slice."""
        own: dict[str, Any] = {name: tensor[rows] for name, tensor in self.tensors().items() if name != "g_idx"}
        return replace(self, **own, shape=(len(own["codes"]), self.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def _check_codes(codes: torch.Tensor, bits: int) -> None:
    mask = (1 << bits) - 1
    spare = ~(mask | mask << 4 if bits <= 4 else mask) & 0xFF
    if (codes & spare).any():
        raise ValueError(f"codes: expected {bits} bits, 0..{mask}, got larger ones")


def _check_zero_points(zero_points: torch.Tensor, dtype: WoqWeightDtype) -> None:
    lowest, highest = zero_point_range(dtype)
    if zero_points.numel() and (zero_points.min() < lowest or zero_points.max() > highest):
        raise ValueError(
            f"zero_points: expected {lowest}..{highest} for {dtype.name}, got {zero_points.min()}..{zero_points.max()}"
        )


def _check_group_order(g_idx: torch.Tensor, scheme: WeightScheme) -> None:
    in_features = g_idx.numel()
    size = in_features if scheme.group_size == PER_CHANNEL else scheme.group_size
    if not torch.equal(g_idx.sort().values, torch.arange(in_features, dtype=torch.int32) // size):
        raise ValueError(
            f"g_idx: expected groups 0..{scheme.group_count(in_features) - 1} with {size} features each "
            f"(the last may have fewer), got values {g_idx.min()}..{g_idx.max()} that are not so divided"
        )


def check_tensor(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Raise TypeError unless `tensor` has one of `dtypes`, and ValueError unless it has `shape`."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
