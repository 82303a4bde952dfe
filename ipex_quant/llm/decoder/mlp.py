"""The MLP of a decoder layer: in few native calls, or the stock module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ... import ops
from ...ops import PostOp
from .attention import part
from .families import Mlp
from .linears import activation_post_op, linear_call, linear_calls

Activation = Callable[[torch.Tensor], torch.Tensor]


class FusedMlp:
    """The linear layers of an MLP and the activation between them, in few native calls.

    `inputs` are gate and up, one linear with both, or the only one before the `activation`, which is of the gate.
    """

    def __init__(
        self, inputs: Sequence[nn.Module], output: nn.Module, activation: Activation | PostOp, gated: bool
    ) -> None:
        self.activation: Any = activation  # called only where it is no post op
        self.post_op = activation if isinstance(activation, PostOp) else activation_post_op(activation)
        self.output = linear_call(output)
        self.first = linear_call(inputs[0])
        self.inputs = linear_calls(inputs)
        self.gated = gated
        if not gated:
            self.intermediate = self._activated
        else:
            self.intermediate = self._gated if len(inputs) == 2 else self._gated_halves

    @classmethod
    def named(cls, module: nn.Module, names: Mlp) -> FusedMlp:
        """The parts of `module` that have `names`."""
        inputs = [part(module, name) for name in names.inputs]
        return cls(inputs, part(module, names.output), part(module, names.activation), names.gated)

    def __call__(self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, *others: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(x), post_op, *others)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.first(x)) if self.post_op is None else self.first(x, self.post_op)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        if self.post_op is not None:
            return self.inputs.gated(x, self.post_op)
        gate, up = self.inputs(x)
        return self.activation(gate) * up

    def _gated_halves(self, x: torch.Tensor) -> torch.Tensor:
        joined = self.first(x)
        if self.post_op == PostOp.SILU:
            return ops.silu_mul_halves(joined)
        if self.post_op in (PostOp.GELU, PostOp.NEW_GELU):
            return ops.gelu_mul_halves(joined, self.post_op == PostOp.NEW_GELU)
        gate, up = joined.chunk(2, dim=-1)
        return self.activation(gate) * up


class StockMlp:
    """Calls the stock MLP, and adds the residuals to its result."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, *others: torch.Tensor) -> torch.Tensor:
        result = self.module(x)
        for other in others:
            result = result + other
        return result
