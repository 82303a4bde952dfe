"""Linear layers fused with the elementwise op after them: activations, multiplications, residual adds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...nn import Int8Linear, WeightOnlyQuantizedLinear
from ...nn.quantized_module import autocast, autocast_dtype
from ...ops import PostOp, float_linear
from ...ops.gradient import needs_gradient
from ...ops.post_op import apply_post_op
from ..decoder.linears import Int8Group, WeightOnlyGroup, is_fused, linear_calls
from .gated import silu_mul


class FusedLinear(nn.Module):
    """Base of the fusions of one linear layer: ``post_op(linear(x), *others)``.

    `linear` is an ``nn.Linear`` or another module that is called with one tensor. `WeightOnlyQuantizedLinear`,
    `Int8Linear` and, where x has few rows, ``nn.Linear`` run the post op within their kernel if `others` have the
    result's shape and dtype. For other modules, if a gradient is needed, or if the layer has hooks, the post op runs in
    torch, and `others` broadcast. Raises TypeError when `linear` is no module.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = _module("linear", linear)


class LinearSilu(FusedLinear):
    """``silu(linear(x))``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.SILU)


class LinearRelu(FusedLinear):
    """``relu(linear(x))``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.RELU)


class LinearGelu(FusedLinear):
    """``gelu(linear(x))``, with the error function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.GELU)


class LinearNewGelu(FusedLinear):
    """``gelu(linear(x), approximate="tanh")``, which transformers calls NewGELUActivation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.NEW_GELU)


class LinearMul(FusedLinear):
    """``linear(x) * y``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.MUL, y)


class LinearAdd(FusedLinear):
    """``linear(x) + y``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.ADD, y)


class LinearAddAdd(FusedLinear):
    """``linear(x) + y + z``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return fused_linear(self.linear, x, PostOp.ADD_ADD, y, z)


class LinearSiluMul(FusedLinear):
    """``silu(linear(x)) * y``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate = fused_linear(self.linear, x, PostOp.NONE)
        return silu_mul(gate, y) if _alike(y, gate) else F.silu(gate) * y


class Linear2SiluMul(nn.Module):
    """``silu(linear_s(x)) * linear_m(x)``: the gate and up projections of a gated MLP.

    Both are linear layers as `FusedLinear` takes them. Two weight-only layers of one dtype and group size, and two
    layers that are an INT8 share group, run in one native call. Raises TypeError when one is no module.
    """

    def __init__(self, linear_s: nn.Module, linear_m: nn.Module) -> None:
        super().__init__()
        self.linear_s = _module("linear_s", linear_s)
        self.linear_m = _module("linear_m", linear_m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linears = linear_calls((self.linear_s, self.linear_m))
        if isinstance(linears, (Int8Group, WeightOnlyGroup)) and not needs_gradient(x):
            return linears.gated(autocast(x), PostOp.SILU)
        gate, up = (fused_linear(linear, x, PostOp.NONE) for linear in (self.linear_s, self.linear_m))
        return silu_mul(gate, up) if _alike(up, gate) else F.silu(gate) * up


def fused_linear(linear: nn.Module, x: torch.Tensor, post_op: PostOp, *others: torch.Tensor) -> torch.Tensor:
    """``post_op(linear(x), *others)``, in one native call under the conditions of `FusedLinear`."""
    shape = (*x.shape[:-1], getattr(linear, "out_features", None))
    fits = all(other.shape == shape and other.dtype == autocast_dtype(x) for other in others)
    if not (fits and _fuses(linear)) or needs_gradient(x, *others):
        return apply_post_op(linear(x), post_op, others)
    if isinstance(linear, WeightOnlyQuantizedLinear):
        return linear.forward_fused(x, post_op, *others)
    if isinstance(linear, Int8Linear):
        return linear.share_group.multiply(autocast(x), post_op, others)[0]
    return float_linear(x, linear.weight, linear.bias, post_op, others)


def _fuses(linear: nn.Module) -> bool:
    """Whether an op can replace calling `linear`.

    It would run no hooks, and would quantize again the activation that the linears of a share group quantize once.
    """
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    if isinstance(linear, Int8Linear):
        return len(linear.share_group.inputs) == 1
    plain = type(linear) is nn.Linear and ("forward" not in vars(linear) or is_fused(linear))
    return plain or isinstance(linear, WeightOnlyQuantizedLinear)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _module(name: str, module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected a linear module, got {type(module).__name__}")
    return module
