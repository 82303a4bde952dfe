"""Norms over the last dimensions of hidden states, or of the sum of hidden states and a residual.

Hidden states are float32, bfloat16 or float16; norms compute in float32, and results have the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ...ops.gradient import needs_gradient
from .gated import check_alike


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x * rsqrt(mean(x**2) + eps) * weight`` over the last dimension K; `weight` ``[K]`` is ones when None.

    Raises RuntimeError when shapes or dtypes do not fit.
    """
    if needs_gradient(hidden_states, weight):
        weight = None if weight is None else weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, eps)
    return ops.rms_norm(hidden_states, _fitting(weight, hidden_states), eps)


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x**2) + eps) * weight`` (Zhang and Sennrich, 2019) over the last of `hidden_size` features.

    `weight` is ``[hidden_size]``, ones when None; a Parameter is shared, not copied. ValueError for another shape.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self.weight = _parameter("weight", torch.ones(hidden_size) if weight is None else weight, (hidden_size,))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    apply_function = staticmethod(rms_norm)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.variance_epsilon}"


def fast_layer_norm(
    hidden_states: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """``torch.nn.functional.layer_norm``; `weight` and `bias` have the shape `normalized_shape`, or are None.

    Raises ValueError or RuntimeError when shapes or dtypes do not fit.
    """
    shape = _shape(normalized_shape)
    if needs_gradient(hidden_states, weight, bias):
        weight, bias = (None if tensor is None else tensor.to(hidden_states.dtype) for tensor in (weight, bias))
        return F.layer_norm(hidden_states, shape, weight, bias, eps)
    _check_ends_with(hidden_states, shape)
    _check_shape("weight", weight, shape)
    _check_shape("bias", bias, shape)
    rows = hidden_states if len(shape) == 1 else hidden_states.flatten(-len(shape))
    return ops.layer_norm(rows, *_affine(weight, bias, hidden_states), eps).view(hidden_states.shape)


class FastLayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last dimensions, whose sizes `normalized_shape` gives.

    `weight` and `bias` have that shape; Parameters are shared, not copied. Raises ValueError for another shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _shape(normalized_shape)
        self.eps = eps
        self.weight = _parameter("weight", weight, self.normalized_shape)
        self.bias = _parameter("bias", bias, self.normalized_shape)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return fast_layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)

    apply_function = staticmethod(fast_layer_norm)

    def extra_repr(self) -> str:
        return f"{list(self.normalized_shape)}, eps={self.eps}"


def add_rms_norm(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    add_back: bool = False,
) -> torch.Tensor:
    """`rms_norm` of ``x + residual``, or of `x` when `residual` is None.

    With `add_back` the sum is written into `residual`. Raises ValueError when `residual` differs from `x` in shape or
    dtype, or when `bias` is given, which RMSNorm does not have.
    """
    if bias is not None:
        raise ValueError("bias: expected None, got a tensor; RMSNorm has no bias")
    if residual is None:
        return rms_norm(x, weight, eps)
    check_alike("residual", residual, x)
    if needs_gradient(residual, x, weight):
        total = x + residual
        normed = rms_norm(total, weight, eps)
    else:
        normed, total = ops.add_rms_norm(x, residual, _fitting(weight, x), eps)
    return _added_back(normed, total, residual, add_back)


def add_layer_norm(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    add_back: bool = False,
) -> torch.Tensor:
    """Layer norm of ``x + residual`` over the last dimension; otherwise like `add_rms_norm`."""
    if residual is None:
        return fast_layer_norm(x, x.shape[-1:], weight, bias, eps)
    check_alike("residual", residual, x)
    if needs_gradient(residual, x, weight, bias):
        total = x + residual
        normed = fast_layer_norm(total, x.shape[-1:], weight, bias, eps)
    else:
        normed, total = ops.add_layer_norm(x, residual, *_affine(weight, bias, x), eps)
    return _added_back(normed, total, residual, add_back)


def _added_back(normed: torch.Tensor, total: torch.Tensor, residual: torch.Tensor, add_back: bool) -> torch.Tensor:
    if add_back:
        residual.copy_(total)
    return normed


def _fitting(vector: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """`vector` in a dtype that the ops accept together with `x`."""
    return vector if vector is None or vector.dtype == x.dtype else vector.float()


def _affine(
    weight: torch.Tensor | None, bias: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias as vectors of one dtype that the ops accept together with `x`."""
    vectors = [tensor if tensor is None or tensor.dim() == 1 else tensor.flatten() for tensor in (weight, bias)]
    if any(vector is not None and vector.dtype != x.dtype for vector in vectors):
        vectors = [None if vector is None else vector.float() for vector in vectors]
    return vectors[0], vectors[1]


def _shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise ValueError("normalized_shape: expected one or more sizes, got none")
    return shape


def _check_ends_with(hidden_states: torch.Tensor, shape: tuple[int, ...]) -> None:
    if hidden_states.shape[-len(shape) :] != shape:
        raise ValueError(
            f"hidden_states: expected the last dimensions {list(shape)}, got shape {list(hidden_states.shape)}"
        )


def _check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def _parameter(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> nn.Parameter | None:
    _check_shape(name, tensor, shape)
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
