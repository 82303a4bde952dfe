"""Weight-only quantized linears: quantizing and packing a weight, and the matmul with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..numerics import affine
from ..numerics.quantized_weight import QuantizedWeight, code_columns, code_dtype, tensor_places
from ..numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from .fakes import check_shape, register_fake
from .gradient import needs_function, needs_gradient
from .isa import multiplies_bfloat16
from .library import native
from .post_op import PostOp
from .woq_header import Offsets, offsets_of, read_header

_OPTIONAL = ("zero_points", "minimums", "super_scales", "super_minimums")


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the blocked form that the kernels read, the same at every ISA level (``csrc/pack/layout.h``).

    - `data`: uint8, one dimension; begins with a header that describes the rest.
    - `perm`: int32 ``[K]``, the input feature at every position in group order (act-order), or None.
    """

    data: torch.Tensor
    perm: torch.Tensor | None
    scheme: WeightScheme
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.data.nbytes + (0 if self.perm is None else self.perm.nbytes)


def quantize_weight(
    weight: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Quantize a weight by rounding to nearest, with the bits of `ipex_quant.numerics.affine.quantize`, but faster.

    `weight` is float32, bfloat16 or float16 ``[N, K]`` on the CPU; `scale_dtype` is that of `affine.quantize`. Raises
    TypeError for another dtype, ValueError for another shape or device, NaN or Inf, and another `scale_dtype`.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.device.type != "cpu":
        raise ValueError(
            f"weight: expected a CPU tensor [N, K] with K > 0, got {list(weight.shape)} on {weight.device}"
        )
    affine.check_plain(scheme)
    half = affine.has_half_scales(scale_dtype)
    try:
        codes, scales, zero_points = native.woq_quantize(
            weight.detach(), scheme.dtype, scheme.group_size, scheme.symmetric, half
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(codes, scales, None if scheme.symmetric else zero_points, None, scheme, shape)


def pack_weight(qw: QuantizedWeight) -> PackedWeight:
    """Pack a quantized weight for the kernels, its scales in the smallest form that loses nothing.

    Raises RuntimeError when scales are no multiples of their super scales.
    """
    parts = {name: tensor.contiguous() for name, tensor in qw.tensors().items() if name != "g_idx"}
    optional = (parts.get(name) for name in _OPTIONAL)
    with torch.inference_mode(False):  # torch.compile of torch 2.10 finds no gradient through inference tensors
        perm = None if qw.g_idx is None else torch.argsort(qw.g_idx, stable=True).to(torch.int32)
        data = native.woq_pack(
            parts["codes"], parts["scales"], *optional, perm, qw.shape[1], qw.scheme.dtype, qw.scheme.group_size
        )
    return PackedWeight(data, perm, qw.scheme, qw.shape)


def unpack_weight(packed: PackedWeight) -> QuantizedWeight:
    """Return the quantized weight that `pack_weight` was given, bit for bit but for the sign of scales that are 0."""
    scheme, (out_features, in_features) = packed.scheme, packed.shape
    supers = 0 if scheme.super_group_size is None else scheme.super_count(in_features)
    sizes = out_features, in_features, scheme.dtype, scheme.group_size, offsets_of(scheme), supers
    codes, scales, *optional = native.woq_unpack(packed.data, packed.perm, *sizes)
    g_idx = None
    if packed.perm is not None:
        group_size = scheme.group_size if scheme.group_size > 0 else in_features
        g_idx = torch.empty(in_features, dtype=torch.int32)
        g_idx[packed.perm.long()] = torch.arange(in_features, dtype=torch.int32) // group_size
    places = tensor_places(scheme, packed.shape, False)
    parts = {name: part for name, part in zip(_OPTIONAL, optional, strict=True) if places[name] is not None}
    return QuantizedWeight(codes, scales, parts.pop("zero_points", None), g_idx, scheme, packed.shape, **parts)


def woq_linear(
    x: torch.Tensor,
    data: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
    post_op: PostOp = PostOp.NONE,
    others: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """``post_op(x @ weight.T + bias, others)`` of a packed weight, as `ipex_quant.ops.reference.woq_linear` defines it.

    `x` is float32, bfloat16 or float16 ``[..., K]``; `data` and `perm` are a PackedWeight's; `bias` is float32 ``[N]``.
    Codes are summed before scales are applied, so that activations beyond about 1e35 overflow float32. Returns
    ``[..., N]`` in the dtype of `x`. Only `x` has a gradient, that of a matmul with the dequantized weight. Raises
    RuntimeError when an argument does not fit the packed weight, and for a post op where a gradient is needed.
    """
    modes = int(lowp_mode), int(act_quant_mode)
    if needs_function(x, *others):
        if post_op != PostOp.NONE:
            raise RuntimeError(
                f"post_op: expected NONE where a gradient is needed, got {PostOp(post_op).name}; apply it to the "
                "result or call under torch.no_grad()"
            )
        return _Differentiable.apply(x, data, out_features, bias, perm, *modes)
    return native.woq_linear(x, data, bias, perm, list(others), out_features, *modes, int(post_op))


def woq_linear_group(
    x: torch.Tensor,
    data: Sequence[torch.Tensor],
    out_features: Sequence[int],
    biases: Sequence[torch.Tensor | None] | None = None,
    perm: torch.Tensor | None = None,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
) -> list[torch.Tensor]:
    """`woq_linear` with several packed weights, bit for bit, which prepares `x` and divides the work only once.

    The weights have one in_features, dtype, group size and `perm`; `biases` has a tensor or None for each. Raises
    RuntimeError when they differ or an argument does not fit them.
    """
    biases = [None] * len(data) if biases is None else list(biases)
    # torch.jit.trace cannot record the op, which takes a list of optional tensors.
    if torch.jit.is_tracing() or needs_gradient(x):
        weights = zip(data, out_features, biases, strict=True)
        return [woq_linear(x, d, n, bias, perm, lowp_mode, act_quant_mode) for d, n, bias in weights]
    return native.woq_linear_group(x, list(data), biases, perm, list(out_features), int(lowp_mode), int(act_quant_mode))


def woq_linear_gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    out_features: int,
    activation: PostOp,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
) -> torch.Tensor:
    """``activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` with packed weights: a gated MLP up to `down`.

    `gate` and `up` are the data of packed weights of one shape, dtype, group size and `perm`; `activation` is GELU,
    NEW_GELU or SILU. Has the bits of `woq_linear` with the activation, then with MUL. Has no gradient. Raises
    RuntimeError when an argument does not fit, or where a gradient is needed.
    """
    if needs_gradient(x):
        raise RuntimeError(
            "woq_linear_gated: expected no need of a gradient; use woq_linear twice or call under torch.no_grad()"
        )
    modes = int(lowp_mode), int(act_quant_mode)
    return native.woq_linear_gated(x, gate, up, gate_bias, up_bias, perm, out_features, *modes, int(activation))


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, data, out_features, bias, perm, lowp_mode, act_quant_mode):
        # save_for_backward refuses inference tensors, such as a weight loaded under inference_mode.
        ctx.weight = data, perm, out_features, x.shape[-1]
        return native.woq_linear(x, data, bias, perm, [], out_features, lowp_mode, act_quant_mode, int(PostOp.NONE))

    @staticmethod
    def backward(ctx, grad):
        return grad @ woq_dequantize(*ctx.weight, grad.dtype), *[None] * 6


def woq_dequantize(
    data: torch.Tensor,
    perm: torch.Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Real values ``[out_features, in_features]`` of a PackedWeight's tensors: `affine.dequantize`, in one op.

    Raises RuntimeError or ValueError when `data` is not a packed weight of that shape.
    """
    return native.woq_dequantize(data, perm, out_features, in_features, dtype)


@torch.library.custom_op(
    "ipex_quant::woq_dequantize",
    mutates_args=(),
    schema="(Tensor data, Tensor? perm, SymInt out_features, SymInt in_features, ScalarType dtype) -> Tensor",
)
def _dequantize(data, perm, out_features, in_features, dtype):
    scheme = read_header(data).scheme
    return affine.dequantize(unpack_weight(PackedWeight(data, perm, scheme, (out_features, in_features))), dtype)


@register_fake("woq_dequantize")
def _(data, perm, out_features, in_features, dtype):
    return data.new_empty(out_features, in_features, dtype=dtype)


def kernel_name(scheme: WeightScheme, lowp_mode: WoqLowpMode, dtype: torch.dtype) -> str:
    """Arithmetic that `woq_linear` uses for this weight and compute mode when the activations have `dtype`."""
    if lowp_mode == WoqLowpMode.INT8:
        return "int8 dot" if scheme.dtype.fits_int8 else "fp32 fma, int8 activations"
    compute = {WoqLowpMode.FP16: torch.float16, WoqLowpMode.BF16: torch.bfloat16}.get(lowp_mode, dtype)
    return "bf16 dot" if compute == torch.bfloat16 and multiplies_bfloat16() else "fp32 fma"


@register_fake("woq_linear")
def _(x, packed, bias, perm, others, out_features, lowp_mode, act_quant_mode, post_op):
    return x.new_empty(*x.shape[:-1], out_features)


@register_fake("woq_linear_group")
def _(x, packed, biases, perm, out_features, lowp_mode, act_quant_mode):
    return [x.new_empty(*x.shape[:-1], n) for n in out_features]


@register_fake("woq_linear_gated")
def _(x, gate, up, gate_bias, up_bias, perm, out_features, lowp_mode, act_quant_mode, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@register_fake("woq_pack")
def _(codes, scales, zero_points, minimums, super_scales, super_minimums, perm, in_features, dtype, group_size):
    # The byte count also depends on the values of the scales.
    return codes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _fake_plain(like, out_features, in_features, dtype, group_size, offsets):
    scheme = WeightScheme(WoqWeightDtype(dtype), offsets == Offsets.NONE, group_size)
    groups = scheme.group_count(in_features)
    columns = code_columns(scheme.dtype, in_features)
    return (
        like.new_empty(out_features, columns, dtype=code_dtype(scheme.dtype)),
        like.new_empty(out_features, groups, dtype=torch.float32),
        like.new_empty(out_features if offsets == Offsets.ZERO_POINTS else 0, groups, dtype=torch.int16),
    )


@register_fake("woq_unpack")
def _(packed, perm, out_features, in_features, dtype, group_size, offsets, supers):
    plain = _fake_plain(packed, out_features, in_features, dtype, group_size, offsets)
    minimums = offsets == Offsets.MINIMUMS
    rows = (out_features if minimums else 0, out_features if supers else 0, out_features if supers and minimums else 0)
    sizes = zip(rows, (plain[1].shape[1], supers, supers), strict=True)
    return *plain, *(packed.new_empty(*size, dtype=torch.float32) for size in sizes)


@register_fake("woq_quantize")
def _(weight, dtype, group_size, symmetric, half_scales):
    check_shape("weight", weight, "[N, K]")
    offsets = Offsets.NONE if symmetric else Offsets.ZERO_POINTS
    return _fake_plain(weight, weight.shape[0], weight.shape[1], dtype, group_size, offsets)
