"""W8A8 convolutions in one to three dimensions: packing INT8 weights, and convolving quantized activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..numerics import affine
from ..numerics.quantized_weight import QuantizedWeight
from .fakes import register_fake
from .int8 import INT8_PER_CHANNEL
from .library import native

TILE = 64
"""Output channels that the kernels compute at a time (``csrc/pack/layout.h``)."""


@dataclass(frozen=True)
class PackedConv:
    """The INT8 weight ``[out, in / groups, *kernel]`` of a convolution as the kernels read it, at every ISA level.

    `data` is uint8, one dimension, in the layout of a share group (``csrc/pack/int8_layout.h``) with one weight for
    each of `blocks`; for a depthwise convolution it is the codes, int8 ``[taps, out]``. `scales` is float32 ``[out]``.
    """

    data: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    groups: int

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has a single input channel, and there are several groups."""
        return self.shape[1] == 1 and self.groups > 1

    @property
    def blocks(self) -> int:
        """Number of matmuls that the kernels run: one for several narrow groups, with zeros for each other's inputs."""
        out = max(self.shape[0] // self.groups, 1)
        return self.groups // max([1, *[n for n in range(2, TILE // out + 1) if self.groups % n == 0]])


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding and dilation for each spatial dimension; `before` and `after` are the padding on each side."""

    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]


def pack_conv(weight: QuantizedWeight, kernel: Sequence[int], groups: int) -> PackedConv:
    """Pack `weight`, ``[out, in / groups * taps]``, which is ``[out, in / groups, *kernel]`` flattened.

    `kernel` has the sizes of one to three dimensions, whose product is `taps`. Raises ValueError when the weight is not
    INT8, symmetric and per channel, or the sizes do not fit.
    """
    if weight.scheme != INT8_PER_CHANNEL:
        raise ValueError(f"weight: expected {INT8_PER_CHANNEL}, got {weight.scheme}; quantize it per channel")
    taps = math.prod(kernel)
    out, columns = weight.shape
    if not 1 <= len(kernel) <= 3 or taps < 1 or columns % taps or groups < 1 or out % groups:
        raise ValueError(f"kernel, groups: {tuple(kernel)} and {groups} do not fit a weight {list(weight.shape)}")
    scales = weight.scales.flatten().contiguous()
    packed = PackedConv(weight.codes, scales, (out, columns // taps, *kernel), groups)
    codes = weight.codes.view(out, columns // taps, taps).transpose(1, 2)
    if packed.is_depthwise:
        data = codes[..., 0].t().contiguous()
    else:
        dense = codes.new_zeros(_dense_shape(packed))
        _diagonal(dense).copy_(codes.reshape(_diagonal(dense).shape))
        data = native.int8_pack(dense.view(out, -1), scales, [out // packed.blocks] * packed.blocks)
    return PackedConv(data, scales, packed.shape, groups)


def unpack_conv(packed: PackedConv) -> QuantizedWeight:
    """Return the weight that `pack_conv` was given, bit for bit, in new tensors."""
    out, channels, *_ = packed.shape
    if packed.is_depthwise:
        codes = packed.data.t().contiguous()
    else:
        shape = _dense_shape(packed)
        dense, _ = native.int8_unpack(packed.data, [out // packed.blocks] * packed.blocks, math.prod(shape[3:]))
        rows = _diagonal(dense.view(shape)).reshape(out, -1, channels)
        codes = rows.transpose(1, 2).reshape(out, -1).contiguous()
    shape = (codes.shape[0], codes.shape[1])
    return QuantizedWeight(codes, packed.scales[:, None].clone(), None, None, INT8_PER_CHANNEL, shape)


def _dense_shape(packed: PackedConv) -> tuple[int, ...]:
    """Shape of the codes with zeros: blocks, groups per block, outputs per group, taps, groups per block, inputs."""
    out, channels, *kernel = packed.shape
    joined = packed.groups // packed.blocks
    return packed.blocks, joined, out // packed.groups, math.prod(kernel), joined, channels


def _diagonal(dense: torch.Tensor) -> torch.Tensor:
    """View of the codes without the zeros: blocks, groups per block, outputs per group, taps, inputs per group."""
    return dense.diagonal(0, 1, 4).movedim(-1, 1)


def int8_conv(
    x: torch.Tensor,
    scale: float,
    zero_point: int,
    packed: PackedConv,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Convolve quantized activations: ``sum((x - zero_point) * codes) * (scale * weight_scale) + bias`` in `dtype`.

    The sum is exact, the rest float32; the padding is the zero point; `ipex_quant.ops.reference_int8` defines the op.
    `x` is uint8, contiguous and channels last, ``[batch, *spatial, in]``; `bias` is float32 ``[out]``. Returns
    ``[batch, *spatial, out]``. `dtype` is float32, bfloat16 or float16. Raises RuntimeError when an argument does not
    fit.
    """
    where = (list(geometry.stride), [*geometry.before, *geometry.after], list(geometry.dilation))
    kernel = list(packed.shape[2:])
    if packed.is_depthwise:
        return native.int8_depthwise_conv(
            x, scale, zero_point, packed.data, packed.scales, bias, packed.groups, kernel, *where, dtype
        )
    return native.int8_conv(
        x, scale, zero_point, packed.data, bias, packed.shape[0], packed.blocks, kernel, *where, dtype
    )


def conv_dequantize(packed: PackedConv, dtype: torch.dtype) -> torch.Tensor:
    """The real values of a packed weight in `dtype`, in its shape."""
    return _dequantize(packed.data, packed.scales, packed.shape, packed.groups, dtype)


@torch.library.custom_op(
    "ipex_quant::int8_conv_dequantize",
    mutates_args=(),
    schema="(Tensor data, Tensor scales, int[] shape, int groups, ScalarType dtype) -> Tensor",
)
def _dequantize(data, scales, shape, groups, dtype):
    weight = unpack_conv(PackedConv(data, scales, tuple(shape), groups))
    return affine.dequantize(weight, torch.float32).view(shape).to(dtype)


@register_fake("int8_conv_dequantize")
def _(data, scales, shape, groups, dtype):
    return scales.new_empty(shape, dtype=dtype)


def _result(
    x: torch.Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    dims = x.dim() - 2
    torch._check(
        1 <= dims <= 3 and len(kernel) == len(stride) == len(dilation) == dims and len(padding) == 2 * dims,
        lambda: f"int8_conv: expected x [batch, ..., channels] and a number for each dimension between, got {x.shape}",
    )
    torch._check(
        min(*kernel, *stride, *dilation) > 0, lambda: "kernel, stride, dilation: expected numbers from 1 on, got others"
    )
    spans = [
        size + padding[i] + padding[dims + i] - dilation[i] * (kernel[i] - 1) - 1
        for i, size in enumerate(x.shape[1:-1])
    ]
    for span in spans:
        torch._check(span >= 0, lambda: "kernel: larger than the padded input")
    sizes = [span // step + 1 for span, step in zip(spans, stride, strict=True)]
    return x.new_empty(x.shape[0], *sizes, out_channels, dtype=dtype)


@register_fake("int8_conv")
def _(x, scale, zero_point, packed, bias, out_channels, groups, kernel, stride, padding, dilation, dtype):
    return _result(x, out_channels, kernel, stride, padding, dilation, dtype)


@register_fake("int8_depthwise_conv")
def _(x, scale, zero_point, codes, weight_scales, bias, groups, kernel, stride, padding, dilation, dtype):
    return _result(x, codes.shape[1], kernel, stride, padding, dilation, dtype)
