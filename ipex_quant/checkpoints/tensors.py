"""Checks of one module's tensors and the making of a `QuantizedWeight`, shared by the integer formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from ..numerics.affine import code_offset
from ..numerics.nibbles import pack_nibbles
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

T = TypeVar("T")

INDEX_DTYPES = (torch.int32, torch.int64)
LINEAR = {
    2: WoqWeightDtype.INT2,
    3: WoqWeightDtype.INT3,
    4: WoqWeightDtype.INT4,
    5: WoqWeightDtype.INT5,
    6: WoqWeightDtype.INT6,
    7: WoqWeightDtype.INT8,
    8: WoqWeightDtype.INT8,
}
"""What holds unsigned codes of 2 to 8 bits."""

SYMMETRIC_ZERO_POINT = {dtype: code_offset(dtype) for dtype in WoqWeightDtype if dtype.has_integers}


def require(tensors: Mapping[str, T], keys: Iterable[str]) -> list[T]:
    """The tensors named `keys`; raises ValueError for one that is missing."""
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, the checkpoint holds only {sorted(tensors)} of this module")
    return [tensors[key] for key in keys]


def check(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Raise unless `tensor` is in CPU memory with one of `dtypes` (TypeError) and has `shape` (ValueError)."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor in CPU memory, got one on {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def check_rank(name: str, tensor: torch.Tensor, rank: int) -> None:
    """Raise ValueError unless `tensor` has `rank` dimensions."""
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {list(tensor.shape)}")


def shape_or_stored(shape: tuple[int | None, int | None], stored: Sequence[int]) -> tuple[int, int]:
    """`shape`, which may lack sizes, with those of `stored`, of two sizes, in their place."""
    rows, columns = (own if want is None else want for want, own in zip(shape, stored, strict=True))
    return rows, columns


def infer_group_size(in_features: int, groups: int) -> int:
    """The power of two that splits `in_features` into `groups`, -1 for one group; ValueError when there is none."""
    if groups == 1:
        return PER_CHANNEL
    group_size = 1 << (-(-in_features // max(groups, 1)) - 1).bit_length()
    if -(-in_features // group_size) != groups:
        raise ValueError(f"scales: {groups} groups do not fit in_features {in_features} with any power of two")
    return group_size


def resolve_group_size(group_size: int | None, in_features: int, groups: int) -> int:
    """The `group_size` that a configuration gives, or None for the inferred one, as a `WeightScheme` has it.

    A group at least as long as a row is one scale per output channel.
    """
    if group_size is None:
        return infer_group_size(in_features, groups)
    power_of_two = group_size > 0 and group_size & (group_size - 1) == 0
    return PER_CHANNEL if group_size >= in_features and not power_of_two else group_size


def normalize_g_idx(g_idx: torch.Tensor, group_size: int, groups: int) -> torch.Tensor | None:
    """Return `g_idx` as int32 for a `QuantizedWeight`, or None when it is ``k // group_size`` or all zeros.

    Raises ValueError when a group lies outside ``0..groups - 1`` or does not have `group_size` features (the last
    group: the remaining ones).
    """
    features = torch.arange(len(g_idx), dtype=torch.int32)
    natural = features.zero_() if group_size == PER_CHANNEL else features // group_size
    if torch.equal(g_idx.int(), natural) or not g_idx.any():
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"g_idx: expected groups 0..{groups - 1}, got {int(g_idx.min())}..{int(g_idx.max())}")
    counts, regular = g_idx.bincount(minlength=groups), natural.bincount(minlength=groups)
    if not torch.equal(counts, regular):
        group = int((counts != regular).nonzero()[0])
        raise ValueError(f"g_idx: expected {regular[group]} features in group {group}, got {counts[group]}")
    return g_idx.int()


def is_shard(g_idx: torch.Tensor, scales: torch.Tensor, group_size: int) -> bool:
    """Whether `scales` ``[N, groups]`` are of more groups than the input features of `g_idx` fill."""
    return group_size != PER_CHANNEL and scales.shape[1] > -(-g_idx.numel() // group_size)


def shard_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    g_idx: torch.Tensor,
    dtype: WoqWeightDtype,
    shape: tuple[int, int],
) -> QuantizedWeight:
    """Make a weight of a part of the input features, `g_idx` ``[K]``, of one with all groups' parameters.

    Its groups are parts of the given ones, as large as one size for all allows: the largest power of two that divides
    the number of features in each. Raises ValueError or TypeError for tensors that do not fit.
    """
    columns, groups = shape[1], scales.shape[1]
    check("g_idx", g_idx, INDEX_DTYPES, (columns,))
    if columns and (g_idx.min() < 0 or g_idx.max() >= groups):
        raise ValueError(f"g_idx: expected groups 0..{groups - 1}, got {int(g_idx.min())}..{int(g_idx.max())}")
    common = math.gcd(*g_idx.bincount().tolist())
    size = common & -common
    order = g_idx.argsort(stable=True)
    parts = g_idx[order][::size].long()
    part_of = torch.empty(columns, dtype=torch.int32)
    part_of[order] = torch.arange(columns, dtype=torch.int32) // size
    zero_points = None if zero_points is None else zero_points[:, parts].contiguous()
    scheme = WeightScheme(dtype, zero_points is None, size)
    normalized = normalize_g_idx(part_of, size, len(parts))
    return QuantizedWeight(codes, scales[:, parts].contiguous(), zero_points, normalized, scheme, shape)


def integer_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    g_idx: torch.Tensor | None,
    scheme: WeightScheme,
    shape: tuple[int, int],
) -> QuantizedWeight:
    """Make a `QuantizedWeight` of its integer `codes`, with `scales` and `zero_points` ``[N, groups]``.

    When every zero point is the offset of a symmetric code, they are dropped and the scheme is symmetric. Raises
    ValueError for scales that are not finite or an irregular `g_idx`.
    """
    if not torch.isfinite(scales).all():
        raise ValueError("scales: expected finite values, got NaN or Inf")
    symmetric = bool((zero_points == SYMMETRIC_ZERO_POINT[scheme.dtype]).all())
    if g_idx is not None:
        g_idx = normalize_g_idx(g_idx, scheme.group_size, scheme.group_count(shape[1]))
    return QuantizedWeight(
        codes.contiguous(),
        scales.float().contiguous(),
        None if symmetric else zero_points.to(torch.int16).contiguous(),
        g_idx,
        WeightScheme(scheme.dtype, symmetric, scheme.group_size),
        shape,
    )


def linear_weight(
    fields: torch.Tensor,
    bits: int,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    group_size: int,
    g_idx: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Weight ``(fields - zero_points) * scales`` of unsigned uint8 `fields` ``[N, K]`` of 2 to 8 bits.

    `scales` are floats ``[N, groups]``, `zero_points` integers of that shape. Raises as `integer_weight` does.
    """
    codes, shape = linear_codes(fields, bits), (fields.shape[0], fields.shape[1])
    return coded_weight(codes, bits, scales, zero_points, group_size, g_idx, shape)


def coded_weight(
    codes: torch.Tensor,
    bits: int,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    group_size: int,
    g_idx: torch.Tensor | None,
    shape: tuple[int, int],
) -> QuantizedWeight:
    """`linear_weight` of codes as a `QuantizedWeight` of `shape` stores them; `zero_points` are of unsigned ones."""
    scheme = WeightScheme(LINEAR[bits], False, group_size)
    zero_points = zero_points.to(torch.int16) - signed_offset(bits)
    return integer_weight(codes, scales, zero_points, g_idx, scheme, shape)


def signed_offset(bits: int) -> int:
    """What is taken off unsigned codes of `bits` to store them: half their range for INT8, which is signed."""
    return 1 << (bits - 1) if LINEAR[bits] == WoqWeightDtype.INT8 else 0


def linear_codes(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned uint8 `fields` ``[N, K]`` of 2 to 8 bits as a `QuantizedWeight` stores the codes."""
    if bits > 6:
        return (fields - signed_offset(bits)).view(torch.int8)  # uint8 wraps around
    return fields if bits > 4 else pack_nibbles(fields)


def raised_weight(
    fields: torch.Tensor, bits: int, scales: torch.Tensor, minimums: torch.Tensor, group_size: int
) -> QuantizedWeight:
    """Weight ``fields * scales + minimums`` of unsigned uint8 `fields` ``[N, K]`` of 2 to 8 bits.

    `scales` and `minimums` are floats ``[N, groups]``; ValueError for those that are not finite.
    """
    scales, minimums = scales.float().contiguous(), minimums.float()
    minimums = (minimums + signed_offset(bits) * scales).contiguous()
    if not torch.isfinite(minimums).all():
        raise ValueError("zero points: expected finite values, got NaN or Inf")
    return QuantizedWeight(
        linear_codes(fields, bits),
        scales,
        None,
        None,
        WeightScheme(LINEAR[bits], False, group_size, minimums=True),
        (fields.shape[0], fields.shape[1]),
        minimums=minimums,
    )


def spread_blocks(scales: torch.Tensor, rows: int, block: tuple[int, int] | None) -> torch.Tensor:
    """Float32 scales ``[rows, groups]`` of ``[1, groups]``, ``[rows, groups]``, or one row for `block` ``[0]`` rows."""
    scales = scales.float()
    if len(scales) == rows:
        return scales.contiguous()
    return scales.repeat_interleave(rows if len(scales) == 1 or block is None else block[0], dim=0)[:rows].contiguous()


def group_of(group: int, columns: int) -> int:
    """The `group_size` of a `WeightScheme` for groups of `group` columns: per channel if one holds all."""
    return PER_CHANNEL if group >= columns else group


def fp8_weight(codes: torch.Tensor, scales: torch.Tensor, group: int) -> QuantizedWeight:
    """Weight of float8 e4m3 `codes` ``[N, K]`` and float32 `scales` ``[N, groups]``; ValueError for NaN or Inf."""
    scheme = WeightScheme(WoqWeightDtype.FP8, True, group_of(group, codes.shape[1]))
    return QuantizedWeight(
        codes.contiguous(), scales.contiguous(), None, None, scheme, (codes.shape[0], codes.shape[1])
    )


def small_integer_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    group: int,
    g_idx: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Weight ``(codes - zero_points) * scales`` of int8 `codes` ``[N, K]``, as INT4 if all are in -8..7, else as INT8.

    `scales` are floats ``[N, groups]``, `zero_points` int8 of that shape, or None. Raises as `integer_weight` does.
    """
    shape = (codes.shape[0], codes.shape[1])
    zero_points = torch.zeros_like(scales, dtype=torch.int16) if zero_points is None else zero_points.to(torch.int16)
    size = group_of(group, shape[1])
    both = (codes, zero_points)
    offset = code_offset(WoqWeightDtype.INT4)
    if all(each.numel() == 0 or (each.min() >= -offset and each.max() < offset) for each in both):
        packed = pack_nibbles((codes + offset).view(torch.uint8))
        scheme = WeightScheme(WoqWeightDtype.INT4, False, size)
        return integer_weight(packed, scales, zero_points + offset, g_idx, scheme, shape)
    return integer_weight(codes, scales, zero_points, g_idx, WeightScheme(WoqWeightDtype.INT8, False, size), shape)


def e8m0_scales(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two, float32, of uint8 exponents plus 127; ValueError for 255, which is NaN."""
    if exponents.numel() and exponents.max() == 255:
        raise ValueError("scales: expected exponents below 255, which is NaN")
    bits = exponents.to(torch.int32) << 23  # the exponent of float32 has the same offset
    return bits.masked_fill(exponents == 0, 1 << 22).view(torch.float32)  # 2 ** -127 is subnormal


def e8m0_exponents(scales: torch.Tensor) -> torch.Tensor | None:
    """The uint8 exponents whose `e8m0_scales` are float32 `scales`; None if these are no powers of two."""
    exponents = (torch.log2(scales).round() + 127).nan_to_num(-1).clamp(0, 254).to(torch.uint8)
    return exponents if torch.equal(e8m0_scales(exponents), scales) else None


def e2m1_weight(
    packed: torch.Tensor,
    scales: torch.Tensor,
    group: int,
    shape: tuple[int, int],
    super_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Weight of 4-bit floats E2M1, uint8 ``[N, K / 2]`` with the first of two in the low bits.

    `scales` are float32 ``[N, K / group]``: of the values, or float8 numbers that are multiplied by `super_scale`.
    """
    scales = scales / 2  # codes stand for twice the values
    supers = None
    if super_scale is not None:
        scales, supers = scales * super_scale, (super_scale / 2).reshape(1, 1).expand(shape[0], 1).contiguous()
    scheme = WeightScheme(WoqWeightDtype.FP4, True, group, super_group_size=None if supers is None else PER_CHANNEL)
    return QuantizedWeight(packed.contiguous(), scales.contiguous(), None, None, scheme, shape, super_scales=supers)
