"""An activation of one tensor times another tensor, as in gated MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import ops
from ...ops.gradient import needs_gradient

APPROXIMATIONS = ("none", "tanh")


def silu_mul(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(x) * y`` of two tensors of one shape and dtype: float32, bfloat16 or float16.

    The result is written to `out` and that returned, if given. Raises ValueError when shapes or dtypes differ.
    """
    check_alike("y", y, x)
    if needs_gradient(x, y):
        return _written(F.silu(x) * y, out)
    return _written(ops.silu_mul(x, y), out)


def gelu_mul(
    x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None, approximate: str = "none"
) -> torch.Tensor:
    """``gelu(x) * y``, like `silu_mul`; `approximate` is that of ``torch.nn.functional.gelu``, "none" or "tanh"."""
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate: expected one of {list(APPROXIMATIONS)}, got {approximate!r}")
    check_alike("y", y, x)
    if needs_gradient(x, y):
        return _written(F.gelu(x, approximate=approximate) * y, out)
    return _written(ops.gelu_mul(x, y, approximate == "tanh"), out)


def check_alike(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """ValueError unless `tensor` has shape and dtype of `like`."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {list(like.shape)} in {like.dtype}, got {list(tensor.shape)} in {tensor.dtype}"
        )


def _written(result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return result
    check_alike("out", out, result)
    return out.copy_(result)
