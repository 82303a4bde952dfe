"""Post ops, which a linear op applies to its result before writing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F


class PostOp(IntEnum):
    """An operation on a linear's result; ADD, ADD_ADD and MUL take other tensors of the result's shape and dtype."""

    NONE = 0
    RELU = 1
    GELU = 2
    NEW_GELU = 3
    SILU = 4
    ADD = 5
    ADD_ADD = 6
    MUL = 7
    RELU2 = 8  # the square of relu


ACTIVATIONS: dict[PostOp, Callable[[torch.Tensor], torch.Tensor]] = {
    PostOp.RELU: torch.relu,
    PostOp.GELU: F.gelu,
    PostOp.NEW_GELU: lambda x: F.gelu(x, approximate="tanh"),
    PostOp.SILU: F.silu,
    PostOp.RELU2: lambda x: torch.relu(x).square(),
}
"""The post ops that take no other tensor, as torch functions."""

GATES = (PostOp.GELU, PostOp.NEW_GELU, PostOp.SILU)
"""The activations that native ops apply to a gate."""


def apply_post_op(result: torch.Tensor, post_op: PostOp, others: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Apply `post_op` in the dtype of `result`, as eager code does: activations in float32, then rounded."""
    if post_op in ACTIVATIONS:
        return ACTIVATIONS[post_op](result)
    if post_op == PostOp.MUL:
        return result * others[0]
    for other in others:
        result = result + other
    return result
