"""W8A8: quantizing activations to unsigned bytes, packing INT8 weights, and multiplying the two as integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..numerics import affine
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype
from .fakes import check_shape, register_fake
from .library import native
from .post_op import PostOp

INT8_PER_CHANNEL = WeightScheme(WoqWeightDtype.INT8, True, PER_CHANNEL)
"""The weights that `pack_int8` takes: signed bytes with one scale per output channel."""


def quantize_activation(x: torch.Tensor, multiplier: torch.Tensor, zero_point: int) -> torch.Tensor:
    """``clamp(round(x * multiplier) + zero_point, 0, 255)``, computed in float32 and rounded to even; NaN gives 0.

    `x` is float32, bfloat16 or float16 ``[..., K]``; `multiplier` is float32 ``[K]`` or ``[1]``. Returns uint8
    ``[..., K]``. Raises RuntimeError when the shapes or dtypes do not fit, or `zero_point` is not in 0..255.
    """
    return native.quantize_activation(x, multiplier, zero_point)


def quantize_activation_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize every row to its own range, which is made to include 0: ``x ~ (codes - zero_point) * scale``.

    `x` is float32, bfloat16 or float16 ``[..., K]``, M rows in all. Returns codes uint8 ``[..., K]``, scales float32
    ``[M]`` and zero points int32 ``[M]``. A row with NaN has the scale NaN. Raises RuntimeError for another dtype.
    """
    return native.quantize_activation_per_token(x)


@dataclass(frozen=True)
class PackedInt8:
    """The INT8 weights of a share group in the one buffer that the kernels read, the same at every ISA level.

    `data` is uint8, one dimension, laid out as in ``csrc/pack/int8_layout.h``: one weight after another. `out_features`
    has one count per weight.
    """

    data: torch.Tensor
    out_features: tuple[int, ...]
    in_features: int

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.data.nbytes

    def member(self, index: int) -> PackedInt8:
        """Return weight `index` alone, a view of the buffer. Raises IndexError for an index out of range."""
        if not 0 <= index < len(self.out_features):
            raise IndexError(f"index: expected 0..{len(self.out_features) - 1}, got {index}")
        own = (self.out_features[index],)
        begin = _packed_bytes(self.out_features[:index], self.in_features)
        end = begin + _packed_bytes(own, self.in_features)
        return PackedInt8(self.data[begin:end], own, self.in_features)


def pack_int8(weights: Sequence[QuantizedWeight]) -> PackedInt8:
    """Pack the weights of a share group, which all multiply the same activations, into one buffer.

    Raises ValueError for an empty list, for a weight that is not INT8, symmetric and per channel, and when they differ
    in K.
    """
    if not weights:
        raise ValueError("weights: expected one or more, got none")
    for weight in weights:
        if weight.scheme != INT8_PER_CHANNEL:
            raise ValueError(f"weights: expected {INT8_PER_CHANNEL}, got {weight.scheme}; quantize them per channel")
    in_features = {weight.shape[1] for weight in weights}
    if len(in_features) > 1:
        raise ValueError(f"weights: expected the same number of input features, got {sorted(in_features)}")
    out_features = tuple(weight.shape[0] for weight in weights)
    codes, scales = _joined([w.codes for w in weights]), _joined([w.scales.flatten() for w in weights])
    return PackedInt8(native.int8_pack(codes, scales, out_features), out_features, in_features.pop())


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)


def unpack_int8(packed: PackedInt8) -> list[QuantizedWeight]:
    """Return the weights that `pack_int8` was given, bit for bit."""
    codes, scales = native.int8_unpack(packed.data, packed.out_features, packed.in_features)
    return [
        QuantizedWeight(c, s[:, None], None, None, INT8_PER_CHANNEL, tuple(c.shape))
        for c, s in zip(codes.split(packed.out_features), scales.split(packed.out_features), strict=True)
    ]


def int8_linear(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    packed: PackedInt8,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    post_op: PostOp = PostOp.NONE,
    others: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """Multiply quantized activations by all weights of a share group: one result ``[..., N_i]`` in `dtype` for each.

    ``post_op(sum((x - zero_point) * codes) * (scale * weight_scale) + bias, others)``: the sum is exact, the rest is
    float32 and rounded to `dtype` before the post op; `ipex_quant.ops.reference_int8` defines the op.

    `x` is uint8 ``[..., K]``, M rows in all, or int8, which is copied; `scales` float32 and `zero_points` int32, in the
    range of `x`, are both ``[1]`` or ``[M]``; `bias` is float32 ``[sum of N_i]``; `others` have `dtype` and the shape
    of the result. `dtype` is float32, bfloat16 or float16. Raises RuntimeError when an argument does not fit, or for a
    post op with several weights.
    """
    return native.int8_linear(
        x, scales, zero_points, packed.data, bias, list(others), packed.out_features, dtype, int(post_op)
    )


def int8_linear_gated(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    packed: PackedInt8,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: PostOp,
) -> torch.Tensor:
    """``activation(gate) * up``, where `int8_linear` gives gate and up for a share group of two weights of one size.

    `activation` is GELU, NEW_GELU or SILU. Has the bits of `int8_linear` with the activation, then with MUL. Returns
    ``[..., N]`` in `dtype`. Raises ValueError for another group, RuntimeError when another argument does not fit.
    """
    if len(packed.out_features) != 2 or packed.out_features[0] != packed.out_features[1]:
        raise ValueError(f"packed: expected two weights of one size, got out_features {packed.out_features}")
    out_features = packed.out_features[0]
    return native.int8_linear_gated(x, scales, zero_points, packed.data, bias, out_features, dtype, int(activation))


@register_fake("quantize_activation")
def _(x, multiplier, zero_point):
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


@register_fake("quantize_activation_per_token")
def _(x):
    rows = math.prod(x.shape[:-1])
    return (
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


def int8_dequantize(packed: PackedInt8, member: int, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Dequantized weight `member` of a share group times the smoothing `factor` of its input, ``[N, K]`` in `dtype`."""
    return _dequantize(packed.data, factor, packed.out_features, packed.in_features, member, dtype)


@torch.library.custom_op(
    "ipex_quant::int8_dequantize",
    mutates_args=(),
    schema="(Tensor data, Tensor? factor, SymInt[] out_features, SymInt in_features, int member, ScalarType dtype) "
    "-> Tensor",
)
def _dequantize(data, factor, out_features, in_features, member, dtype):
    packed = PackedInt8(data, tuple(out_features), in_features)
    weight = affine.dequantize(unpack_int8(packed.member(member))[0], torch.float32)
    return (weight if factor is None else weight * factor).to(dtype)


@register_fake("int8_dequantize")
def _(data, factor, out_features, in_features, member, dtype):
    return data.new_empty(out_features[member], in_features, dtype=dtype)


def _packed_bytes(out_features: Sequence[int], in_features: int) -> int:
    folds, lines = -(-in_features // 65536), -(-in_features // 4)
    return sum(64 + -(-n // 64) * 256 * (1 + folds + lines) for n in out_features)


@register_fake("int8_pack")
def _(codes, scales, out_features):
    check_shape("codes", codes, "[N, K]")
    return codes.new_empty(_packed_bytes(out_features, codes.shape[1]), dtype=torch.uint8)


@register_fake("int8_unpack")
def _(packed, out_features, in_features):
    rows = sum(out_features)
    return packed.new_empty(rows, in_features, dtype=torch.int8), packed.new_empty(rows, dtype=torch.float32)


@register_fake("int8_linear")
def _(x, scales, zero_points, packed, bias, others, out_features, dtype, post_op):
    return [x.new_empty(*x.shape[:-1], n, dtype=dtype) for n in out_features]


@register_fake("int8_linear_gated")
def _(x, scales, zero_points, packed, bias, out_features, dtype, activation):
    return x.new_empty(*x.shape[:-1], out_features, dtype=dtype)
