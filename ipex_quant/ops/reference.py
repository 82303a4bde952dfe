"""Plain-torch definitions of the native ops: the oracle of their tests, written to be read, not to be fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..numerics import affine
from ..numerics.codebooks import NF4_LEVELS
from ..numerics.nibbles import as_bytes, pack_nibbles, unpack_nibbles
from ..numerics.quantized_stack import QuantizedStack
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from .experts import ExpertGate
from .post_op import PostOp, apply_post_op

ACT_BLOCK = 128
"""Input features that share an activation scale in the ``*_IC_BLOCK`` modes when the weight is per channel."""

MAX_FOLD = 8192
"""Longest run of 8-bit products (at most 255 * 255 each) whose sum is sure to fit int32."""

MIN_RANGE = 2.0**-118
"""Smallest activation range that does not count as zero: the inverse of a smaller one overflows float32."""

_COMPUTE_DTYPE = {WoqLowpMode.FP16: torch.float16, WoqLowpMode.BF16: torch.bfloat16}


def quantize_weight(
    weight: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Quantize ``[N, K]`` by rounding to nearest; raises as `ipex_quant.numerics.affine.quantize` does."""
    return affine.quantize(weight, scheme, scale_dtype=scale_dtype)


def woq_linear(
    x: torch.Tensor,
    qw: QuantizedWeight,
    bias: torch.Tensor | None = None,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
    post_op: PostOp = PostOp.NONE,
    others: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """``post_op(x @ dequantize(qw).T + bias, others)``: ``[..., K]`` to ``[..., N]`` in the dtype of `x`.

    Compute modes NONE, FP16 and BF16 round `x` to the compute dtype and keep the weight exact, except that BF16 also
    rounds the levels of NF4. Compute mode INT8 quantizes `x` as `act_quant_mode` says and sums integers. `bias` is
    float32 ``[N]`` and is added in float32; the sum is rounded to the dtype of `x` before `post_op`. Raises ValueError
    for INT8 without an `act_quant_mode`.
    """
    acc = woq_sums(x.reshape(-1, qw.shape[1]), qw, bias, lowp_mode, act_quant_mode)
    return apply_post_op(acc.to(x.dtype).reshape(*x.shape[:-1], qw.shape[0]), post_op, others)


def woq_embedding(ids: torch.Tensor, qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows `ids` of ``dequantize(qw)``, ``[*ids.shape, K]`` in `dtype`; raises IndexError for an id out of range."""
    return torch.nn.functional.embedding(ids, affine.dequantize(qw, dtype))


def woq_sums(
    x: torch.Tensor,
    qw: QuantizedWeight,
    bias: torch.Tensor | None,
    lowp_mode: WoqLowpMode,
    act_quant_mode: WoqActQuantMode,
) -> torch.Tensor:
    """`woq_linear` of rows ``[M, K]`` in float32, before it is rounded to the dtype of `x`."""
    if lowp_mode == WoqLowpMode.INT8 and act_quant_mode == WoqActQuantMode.NONE:
        raise ValueError("act_quant_mode: compute mode INT8 needs one, got NONE")
    if lowp_mode != WoqLowpMode.INT8:
        acc = _float_matmul(x.to(_COMPUTE_DTYPE.get(lowp_mode, x.dtype)), qw)
    else:
        acc = _byte_matmul(x.float(), qw, act_quant_mode)
    return acc if bias is None else acc + bias


def woq_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: QuantizedStack,
    down: QuantizedStack,
    gate: ExpertGate,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
) -> torch.Tensor:
    """Weighted sum of the experts' results for each row of `x` ``[T, H]``, as in `ipex_quant.ops.woq_experts`."""
    sums = torch.zeros(x.shape)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        bias = None if gate_up_bias is None else gate_up_bias[expert]
        both = woq_sums(x[token], gate_up[expert], bias, lowp_mode, act_quant_mode)
        both = both.to(x.dtype) if gate.clamp is None else both
        bias = None if down_bias is None else down_bias[expert]
        hidden = gate(*both.chunk(gate.blocks, dim=-1)).to(x.dtype)
        rows = woq_sums(hidden, down[expert], bias, lowp_mode, act_quant_mode)
        for row, (t, j) in enumerate(zip(token.tolist(), choice.tolist(), strict=True)):
            sums[t] += weights[t, j] * rows[row]
    return sums.to(x.dtype)


def group_order(qw: QuantizedWeight) -> torch.Tensor:
    """Input features sorted by their group, int64 ``[K]``: the order in which kernels read K."""
    return affine.feature_groups(qw).argsort(stable=True)


class QuantizedActivation(NamedTuple):
    """Quantized rows ``[M, K]``: ``x = (codes - zero_points) * scales``.

    All float32: `codes` ``[M, K]``, `scales` and `zero_points` ``[M, blocks]``; `block` counts the features of a block.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    block: int


def quantize_activation(x: torch.Tensor, block: int, mode: WoqActQuantMode) -> QuantizedActivation:
    """Quantize float32 ``[M, K]`` dynamically, one scale for each block of `block` features of a row.

    PER_TENSOR and PER_BATCH ignore `block` and use all of K; PER_TENSOR and PER_IC_BLOCK share ranges among the rows.
    """
    symmetric = mode >= WoqActQuantMode.PER_TENSOR_SYM
    scope = WoqActQuantMode(mode - WoqActQuantMode.PER_TENSOR_SYM) if symmetric else mode
    whole_row = scope in (WoqActQuantMode.PER_TENSOR, WoqActQuantMode.PER_BATCH)
    block = x.shape[1] if whole_row else min(block, x.shape[1])
    parts = x.split(block, dim=1)
    low = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0)
    high = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0)
    if scope in (WoqActQuantMode.PER_TENSOR, WoqActQuantMode.PER_IC_BLOCK) and len(x) > 0:
        low, high = low.amin(0).expand_as(low), high.amax(0).expand_as(high)
    span, steps = (torch.maximum(-low, high), 127.0) if symmetric else (high - low, 255.0)
    # A true division: `float / tensor` would multiply by a rounded reciprocal.
    inverse = torch.where(span < MIN_RANGE, torch.zeros_like(span), torch.full_like(span, steps) / span)
    zero_points = torch.zeros_like(span) if symmetric else (-low * inverse).round().clamp(0, 255)
    blocks = torch.arange(x.shape[1]) // block
    codes = (x * inverse[:, blocks]).round() + zero_points[:, blocks]
    codes = codes.clamp(-127, 127) if symmetric else codes.clamp(0, 255)
    return QuantizedActivation(codes, span / steps, zero_points, block)


def _float_matmul(x: torch.Tensor, qw: QuantizedWeight) -> torch.Tensor:
    weight = affine.dequantize(qw).double()
    if qw.scheme.dtype == WoqWeightDtype.NF4 and x.dtype == torch.bfloat16:
        levels = NF4_LEVELS.bfloat16().double()[affine.stored_codes(qw).int()]
        weight = levels * qw.scales.double()[:, affine.feature_groups(qw)]
    return (x.double() @ weight.T).float()


def _byte_matmul(x: torch.Tensor, qw: QuantizedWeight, mode: WoqActQuantMode) -> torch.Tensor:
    order = group_order(qw)
    group = qw.shape[1] if qw.scheme.group_size == PER_CHANNEL else qw.scheme.group_size
    act = quantize_activation(x[:, order], ACT_BLOCK if qw.scheme.group_size == PER_CHANNEL else group, mode)
    if not qw.scheme.dtype.fits_int8:
        blocks = torch.arange(x.shape[1]) // act.block
        restored = (act.codes - act.zero_points[:, blocks]) * act.scales[:, blocks]
        return (restored.double() @ affine.dequantize(qw)[:, order].double().T).float()
    weight, scales = _integer_weight(qw)
    weight = weight[:, order]
    result = torch.zeros(len(x), qw.shape[0])
    fold = min(group, act.block, MAX_FOLD)
    for start in range(0, x.shape[1], fold):
        k = slice(start, start + fold)
        block = start // act.block
        shifted = act.codes[:, k] - act.zero_points[:, block, None]
        dot = (shifted.double() @ weight[:, k].double().T).float()  # the integer sum, rounded once
        result = _fma(dot, act.scales[:, block, None] * scales[:, start // group], result)
        if qw.minimums is not None:
            total = shifted.sum(1, keepdim=True) * act.scales[:, block, None]
            result = _fma(qw.minimums[:, start // group].expand_as(result), total.expand_as(result), result)
    return result


def transpose_nibbles(words: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """`ops.transpose_nibbles` by its definition."""
    columns = words.shape[1]
    nibbles = unpack_nibbles(as_bytes(words), 8 * columns).t().unflatten(0, (columns, 8))
    placed = torch.empty_like(nibbles)
    placed[:, list(order)] = nibbles
    return pack_nibbles(placed.flatten(0, 1))


def _integer_weight(qw: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes minus zero points, ``[N, K]`` in float32, and their scales."""
    if qw.scheme.dtype == WoqWeightDtype.NF4:
        codes = (NF4_LEVELS * 127).round()[affine.stored_codes(qw).int()]
        return codes, qw.scales * torch.tensor(1 / 127, dtype=torch.float32)
    codes = affine.code_values(qw)
    if qw.zero_points is not None:
        codes -= qw.zero_points[:, affine.feature_groups(qw)]
    return codes, qw.scales


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c`` of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded there to odd (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008), which makes the second rounding, to float32, that of the exact value.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    other = total - product
    error = (product - (total - other)) + (addend - other)
    bits = total.view(torch.int64)
    away = (error > 0) == (total > 0)
    odd = torch.where(away, bits + 1, bits - 1)
    inexact = (error != 0) & (bits % 2 == 0) & torch.isfinite(total)
    return torch.where(inexact, odd, bits).view(torch.float64).float()
