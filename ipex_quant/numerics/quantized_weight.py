"""`QuantizedWeight`: the plain, ISA-independent form of one quantized weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

CODE_DTYPES = {
    WoqWeightDtype.INT8: torch.int8,
    WoqWeightDtype.INT4: torch.uint8,
    WoqWeightDtype.NF4: torch.uint8,
    WoqWeightDtype.FP8: torch.float8_e4m3fn,
}
"""torch dtype that holds the codes of each weight dtype; INT4 and NF4 hold two codes a byte."""

ZERO_POINT_RANGE = {WoqWeightDtype.INT8: (-128, 127), WoqWeightDtype.INT4: (0, 16)}
"""Lowest and highest zero point: the range of the codes, and for INT4 also 16, which version 1 GPTQ files may hold."""


def code_columns(dtype: WoqWeightDtype, in_features: int) -> int:
    """Second dimension of `codes`: bytes (or elements) that one row of `in_features` codes takes."""
    return (in_features + 1) // 2 if dtype in (WoqWeightDtype.INT4, WoqWeightDtype.NF4) else in_features


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight ``[out_features, in_features]``: ``w = (codes - zero_points) * scales``.

    - `codes`: int8 ``[N, K]`` (INT8); uint8 ``[N, ceil(K / 2)]``, even k in the low nibble and, with an odd K, 0 in the
      last high one (INT4 as 0..15, NF4 as codebook index); float8_e4m3fn ``[N, K]`` (FP8).
    - `scales`: float32 ``[N, groups]``.
    - `zero_points`: int16 ``[N, groups]`` within `ZERO_POINT_RANGE`, or None when the scheme is symmetric; a symmetric
      INT4 code stands for ``code - 8``.
    - `g_idx`: int32 ``[K]``, the group of every input feature (act-order), or None when feature k is in group
      ``k // group_size``. It reorders the features; the groups keep their sizes.
    - `shape`: the logical ``(out_features, in_features)``.

    Raises ValueError or TypeError when the tensors do not fit the scheme and the shape, or hold invalid values: a scale
    or FP8 code that is not finite, a zero point out of range.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    g_idx: torch.Tensor | None
    scheme: WeightScheme
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        groups = self.scheme.group_count(in_features)
        dtype = self.scheme.dtype
        _check_tensor("codes", self.codes, CODE_DTYPES[dtype], (out_features, code_columns(dtype, in_features)))
        _check_tensor("scales", self.scales, torch.float32, (out_features, groups))
        if self.scheme.symmetric != (self.zero_points is None):
            raise ValueError(f"zero_points: a {self.scheme} weight must {'not ' * self.scheme.symmetric}have them")
        if self.zero_points is not None:
            _check_tensor("zero_points", self.zero_points, torch.int16, (out_features, groups))
            _check_zero_points(self.zero_points, dtype)
        if not torch.isfinite(self.scales).all():
            raise ValueError("scales: expected finite values, got NaN or Inf; check where the weight comes from")
        if dtype == WoqWeightDtype.FP8 and self.codes.isnan().any():
            raise ValueError("codes: expected finite FP8 values, got NaN; check where the weight comes from")
        if self.g_idx is not None:
            _check_tensor("g_idx", self.g_idx, torch.int32, (in_features,))
            _check_group_order(self.g_idx, self.scheme)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.codes, self.scales, self.zero_points, self.g_idx)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _check_zero_points(zero_points: torch.Tensor, dtype: WoqWeightDtype) -> None:
    lowest, highest = ZERO_POINT_RANGE[dtype]
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


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
