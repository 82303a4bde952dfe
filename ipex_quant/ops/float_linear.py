"""Linears with float weights, which the native op reads once, as they are, where x has few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..numerics.scheme import FLOAT_DTYPES
from .fakes import register_fake
from .gradient import needs_gradient
from .isa import supported_isas
from .library import native
from .post_op import PostOp, apply_post_op

_MULTIPLIES_BFLOAT16 = "avx512_bf16" in supported_isas()  # then torch's operator does so, which the native does not

MAX_ROWS = {torch.float32: 8, torch.float16: 8, torch.bfloat16: 2 if _MULTIPLIES_BFLOAT16 else 8}
"""The most rows of x with which the native op is faster than torch's, by dtype (`benchmarks/float_linear.py`)."""

_float_linear = native.float_linear.default


def float_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    post_op: PostOp = PostOp.NONE,
    others: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """``post_op(F.linear(x, weight, bias), *others)``.

    `x` ``[..., K]``, `weight` ``[N, K]``, `bias` ``[N]`` and `others`, of the result's shape ``[..., N]``, have one
    dtype. The native op, which sums in float32, in the same order on every CPU, computes what `is_native` names;
    torch's own operators compute the rest, gradients among it. Raises RuntimeError when shapes or dtypes do not fit.
    """
    if is_native(x, weight, bias, *others):
        return _float_linear(x, weight, bias, others, int(post_op))
    return apply_post_op(F.linear(x, weight, bias), post_op, others)


def has_few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x has at most `MAX_ROWS` rows for the dtype of `weight`, and any."""
    return 0 < x.numel() <= MAX_ROWS.get(weight.dtype, 0) * weight.shape[-1]


def is_native(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether `float_linear` is native for x and weight: few rows of float32, bfloat16 or float16.

    No gradient may be needed, nor a cast by autocast; nor does the op suit `torch.export` and `torch.jit.trace`, whose
    graphs serve any number of rows, or subclasses of tensors and `torch.func`, which see torch's operators only.
    """
    return (
        not torch.jit.is_tracing()  # these first, since a graph would keep the number of rows as a condition
        and not torch.compiler.is_exporting()
        and has_few_rows(x, weight)
        and x.dtype == weight.dtype
        and x.dtype in FLOAT_DTYPES
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.dim() == 2
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and not needs_gradient(x, weight, *others)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype)
        and not torch._C._are_functorch_transforms_active()
    )


@register_fake("float_linear")
def _(x, weight, bias, others, post_op):
    torch._check(
        x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: f"x: expected [..., K] for a weight [N, K], got {list(x.shape)} and {list(weight.shape)}",
    )
    return x.new_empty(*x.shape[:-1], weight.shape[0])
