"""Mixture of experts with packed weights: packing the stacks, and running tokens through their experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..numerics import affine
from ..numerics.quantized_stack import QuantizedStack
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode
from .fakes import check_shape, register_fake
from .gradient import needs_function
from .library import native
from .post_op import ACTIVATIONS, PostOp
from .woq import PackedWeight, pack_weight, unpack_weight
from .woq_header import HEADER_BYTES, header_for

_woq_experts = native.woq_experts.default

TILE_ROWS = 64
"""Output features of a tile (``csrc/pack/layout.h``); every expert begins with a tile of its own."""


@dataclass(frozen=True)
class ExpertGate:
    """The activation of an expert, between its projections: ``activation(gate) * up``.

    If not `gated`, it is ``activation(up)``, and `activation` may also be RELU or RELU2.

    With `clamp`, ``(limit, slope, offset)``, it is ``g * sigmoid(slope * g) * (u + offset)``, where
    ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)``; `activation` is then SILU and the slope positive.
    """

    activation: PostOp
    clamp: tuple[float, float, float] | None = None
    gated: bool = True

    @property
    def blocks(self) -> int:
        """Projections before the activation: gate and up, or up alone."""
        return 2 if self.gated else 1

    def __call__(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Activate tensors of one shape and dtype, rounding as eager code does; with `clamp`, rounding once.

        If not `gated`, the only tensor is up.
        """
        if self.clamp is None:
            activated = ACTIVATIONS[self.activation](gate.float()).to(gate.dtype)
            return activated if up is None else activated * up
        assert up is not None  # a gate is clamped together with what it multiplies
        limit, slope, offset = self.clamp
        wide, shifted = gate.float().clamp(max=limit), up.float().clamp(-limit, limit) + offset
        return (wide * torch.sigmoid(slope * wide) * shifted).to(gate.dtype)


@dataclass(frozen=True)
class PackedExperts:
    """The stacked weights of experts as the kernels read them: one packed weight with the rows of all experts.

    An expert has `blocks` blocks of rows (two for gate and up, else one), each padded to whole tiles. `perm`, int32
    ``[E, K]`` or None, is `PackedWeight.perm` of every expert. `shape` is that of the stack.
    """

    data: torch.Tensor
    perm: torch.Tensor | None
    scheme: WeightScheme
    shape: tuple[int, int, int]
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of the packed weight."""
        experts, out_features, _ = self.shape
        return experts * self.blocks * _padded(out_features // self.blocks)


def pack_experts(stack: QuantizedStack, blocks: int) -> PackedExperts:
    """Pack a stack for the kernels; `blocks` divides its out_features."""
    perm, codes = None, stack.codes
    if stack.g_idx is not None:
        perm = stack.g_idx.argsort(dim=1, stable=True).to(torch.int32)
        codes = torch.stack([_with_features(stack[expert], perm[expert]) for expert in range(len(perm))])
    tensors = stack.tensors() | {"codes": codes}
    parts: dict[str, Any] = {name: _fill_tiles(t, blocks) for name, t in tensors.items() if name != "g_idx"}
    shape = (len(parts["codes"]), stack.shape[2])
    parts = dict.fromkeys(("zero_points", "g_idx")) | parts
    data = pack_weight(QuantizedWeight(**parts, scheme=stack.scheme, shape=shape)).data
    return PackedExperts(data, perm, stack.scheme, stack.shape, blocks)


def split_experts(packed: PackedExperts) -> torch.Tensor:
    """Return one packed weight per expert, as `woq_linear` takes it, in one tensor: uint8 ``[E, bytes]``.

    The stack must have one block and no `perm`.
    """
    experts, out_features, _ = packed.shape
    header, tiles = header_for(packed.data, out_features), packed.data[HEADER_BYTES:].view(experts, -1)
    return torch.cat((header.expand(experts, -1), tiles), dim=1)


def unpack_experts(packed: PackedExperts) -> QuantizedStack:
    """Return the stack that `pack_experts` was given, bit for bit."""
    experts, out_features, in_features = packed.shape
    qw = unpack_weight(PackedWeight(packed.data, None, packed.scheme, (packed.rows, in_features)))
    size = out_features // packed.blocks

    def stacked(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(experts, packed.blocks, -1, tensor.shape[1])[:, :, :size].reshape(experts, out_features, -1)

    parts: dict[str, Any] = dict.fromkeys(("zero_points", "g_idx")) | {
        name: stacked(tensor) for name, tensor in qw.tensors().items()
    }
    stack = QuantizedStack(**parts, scheme=packed.scheme, shape=packed.shape)
    if packed.perm is None:
        return stack
    inverse = packed.perm.argsort(dim=1)
    codes = torch.stack([_with_features(stack[expert], inverse[expert]) for expert in range(experts)])
    g_idx = (inverse // (packed.scheme.group_size if packed.scheme.group_size > 0 else in_features)).int()
    return replace(stack, codes=codes, g_idx=g_idx)


def _padded(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def _fill_tiles(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """Reshape ``[E, blocks * n, columns]`` to ``[E * blocks * padded n, columns]``, padded with zeros."""
    experts, rows, columns = tensor.shape
    split = tensor.reshape(experts, blocks, rows // blocks, columns)
    if rows // blocks % TILE_ROWS:
        filled = tensor.new_zeros(experts, blocks, _padded(rows // blocks), columns)
        filled[:, :, : rows // blocks] = split
        split = filled
    return split.reshape(-1, columns)


def _with_features(qw: QuantizedWeight, order: torch.Tensor) -> torch.Tensor:
    """Codes of a weight with its input features in another order."""
    codes = affine.stored_codes(qw)[:, order.long()]
    return affine.plain_codes(codes, qw.scheme.dtype)


def woq_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    gate: ExpertGate,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
) -> torch.Tensor:
    """Sum of ``weights[t, j] * down_e(gate(gate_e(x[t]), up_e(x[t])))`` over the experts ``e = experts[t, j]``.

    - `x`: float32, bfloat16 or float16 ``[T, H]``.
    - `experts`: int64 ``[T, k]``, expert indices. `weights`: float ``[T, k]``.
    - `gate_up`: stack ``[E, 2 * I, H]``, the gate and then the up projection, in two blocks, or ``[E, I, H]`` in one
      if there is no gate; `down`: ``[E, H, I]``.
    - `gate_up_bias`, `down_bias`: float32 ``[E, 2 * I]`` or ``[E, I]``, and ``[E, H]``.

    Every expert runs `woq_linear` on its tokens, except that the operands of a clamped gate are not rounded. The gate's
    result is rounded to the dtype of `x`; the results of `down` are not rounded and are added in float32 in the order
    of experts, so that the sum does not depend on the number of threads. Only the weights of chosen experts are read.
    Returns ``[T, H]`` in the dtype of `x`. `x` and `weights` have gradients. Raises RuntimeError when an argument does
    not fit, before anything is computed.
    """
    sizes = gate_up.shape[0], gate_up.shape[1] // gate.blocks
    tensors = gate_up.data, down.data, gate_up_bias, down_bias, gate_up.perm, down.perm
    modes = int(lowp_mode), int(act_quant_mode)
    return run_experts(x, experts, weights, *tensors, *sizes, *modes, *gate_arguments(gate))


def gate_arguments(gate: ExpertGate) -> tuple[int, list[float], bool]:
    """Return `gate` as the native op takes it: activation, clamp, gated."""
    return int(gate.activation), list(gate.clamp or ()), gate.gated


def run_experts(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Run `woq_experts` with the other arguments in the form and order of the native op."""
    if experts.dtype != torch.int64:
        experts = experts.to(torch.int64)
    if needs_function(x, weights):
        return _Differentiable.apply(x, weights, experts, *arguments)
    return _woq_experts(x, experts, weights, *arguments)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, experts, *arguments):
        # save_for_backward refuses inference tensors, such as a weight loaded under inference_mode.
        ctx.arguments = x.detach(), weights.detach(), experts, *arguments
        return _woq_experts(x, experts, weights, *arguments)

    @staticmethod
    def backward(ctx, grad):
        x, weights, experts, *arguments = ctx.arguments
        return *_backward(grad, x, experts, weights, *arguments), *[None] * (1 + len(arguments))


_ARGUMENTS = (
    "Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? gate_up_perm, Tensor? down_perm, int num_experts, int intermediate, int lowp_mode, int act_quant_mode, "
    "int activation, float[] clamp, bool gated"
)


@torch.library.custom_op(
    "ipex_quant::woq_experts_backward", mutates_args=(), schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _backward(
    grad, x, experts, weights, gate_up, down, up_bias, down_bias, up_perm, down_perm, count, width, _, __, *how
):
    gate = ExpertGate(PostOp(how[0]), tuple(how[1]) or None, how[2])
    x_grad, weights_grad = torch.zeros(x.shape, dtype=torch.float32), torch.zeros(weights.shape, dtype=torch.float32)
    for expert in experts.unique().tolist():
        up_weight = _expert_weight(gate_up, up_perm, expert, (count, gate.blocks, width, x.shape[1]))
        down_weight = _expert_weight(down, down_perm, expert, (count, 1, x.shape[1], width))
        token, choice = (experts == expert).nonzero(as_tuple=True)
        both = F.linear(x[token].float(), up_weight, None if up_bias is None else up_bias[expert])
        both = both.chunk(gate.blocks, dim=-1)
        out = F.linear(gate(*both), down_weight, None if down_bias is None else down_bias[expert])
        rows = grad[token].float()
        weights_grad[token, choice] = (rows * out).sum(-1)
        hidden_grad = (rows * weights[token, choice, None]) @ down_weight
        x_grad.index_add_(0, token, torch.cat(_gate_gradients(gate, both, hidden_grad), dim=-1) @ up_weight)
    return x_grad.to(x.dtype), weights_grad.to(weights.dtype)


def _gate_gradients(
    gate: ExpertGate, operands: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``gate(*operands)`` for each of them, all float32."""
    x = operands[0]
    if not gate.gated:
        return (_activation_gradient(gate.activation, x, grad),)
    up = operands[1]
    if gate.clamp is not None:
        limit, slope, offset = gate.clamp
        g, shifted = x.clamp(max=limit), up.clamp(-limit, limit) + offset
        s = torch.sigmoid(slope * g)
        x_grad = grad * shifted * s * (1 + slope * g * (1 - s)) * (x <= limit)
        return x_grad, grad * g * s * (up.abs() <= limit)
    return _activation_gradient(gate.activation, x, grad * up), grad * gate(x, torch.ones_like(up))


def _activation_gradient(activation: PostOp, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    if activation in (PostOp.RELU, PostOp.RELU2):
        return grad * ((x > 0) if activation == PostOp.RELU else 2 * x.clamp(min=0))
    if activation == PostOp.SILU:
        return torch.ops.aten.silu_backward(grad, x)
    approximate = "tanh" if activation == PostOp.NEW_GELU else "none"
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)


@register_fake("woq_experts_backward")
def _(grad, x, experts, weights, *arguments):
    return torch.empty_like(x), torch.empty_like(weights)


def _expert_weight(
    data: torch.Tensor, perm: torch.Tensor | None, expert: int, sizes: tuple[int, int, int, int]
) -> torch.Tensor:
    """Real values ``[blocks * n, K]`` of one expert of a packed stack; `sizes` is ``(experts, blocks, n, K)``."""
    count, blocks, n, in_features = sizes
    rows = blocks * _padded(n)
    packed = torch.cat((header_for(data, rows), data[HEADER_BYTES:].view(count, -1)[expert]))
    values = native.woq_dequantize(packed, None, rows, in_features, torch.float32)
    values = values.view(blocks, -1, in_features)[:, :n].reshape(blocks * n, in_features)
    return values if perm is None else values[:, perm[expert].argsort()]


@register_fake("woq_experts")
def _(x, experts, weights, *arguments):
    check_shape("x", x, "[T, K]")
    return x.new_empty(x.shape)
