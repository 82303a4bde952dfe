"""Trials of a module's own code: its linear layers return what was made up, and note what they are given.

What comes out tells how the code joins its linears, whatever names it gives them and however they are quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...nn.linears import PackedLinear, is_linear
from .watched_forward import has_hooks


class StandIn(nn.Module):
    """Stands in for a linear layer: returns random numbers, and keeps its `inputs` and `results`, call by call."""

    def __init__(self, linear: nn.Module, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = features(linear)
        self.scale, self.generator = scale, generator
        self.inputs: list[torch.Tensor] = []
        self.results: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        self.inputs.append(x)
        self.results.append(self.scale * torch.randn(shape, generator=self.generator, dtype=torch.float32))
        return self.results[-1]


def features(linear: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, in float or quantized."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf  # transformers' Conv1D


def linear_children(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are attributes of `module`, by name, in float or quantized."""
    return {
        name: child for name, child in module._modules.items() if is_linear(child) or isinstance(child, PackedLinear)
    }


def others_have_hooks(module: nn.Module, linears: Mapping[str, nn.Module]) -> bool:
    """Whether a module in `module` that is none of `linears`, nor part of one, has hooks."""
    known = {id(part) for linear in linears.values() for part in linear.modules()} | {id(module)}
    return any(has_hooks(part) for part in module.modules() if id(part) not in known)


def with_stand_ins(module: nn.Module, linears: Mapping[str, nn.Module], scale: float) -> tuple[Any, dict[str, StandIn]]:
    """A shallow copy of `module` with stand-ins for `linears`, and these by name."""
    generator = torch.Generator().manual_seed(0)
    stand_ins = {name: StandIn(linear, scale, generator) for name, linear in linears.items()}
    probe = copy.copy(module)
    probe.__dict__ |= {"_modules": module._modules | stand_ins}
    return probe, stand_ins


def same(given: Any, expected: torch.Tensor, tolerance: float = 0.0) -> bool:
    """Whether `given` is a tensor of the shape and the numbers of `expected`."""
    is_like = isinstance(given, torch.Tensor) and given.shape == expected.shape
    return is_like and torch.allclose(given, expected, rtol=tolerance, atol=tolerance)
