"""Activations that write over what the layer before them returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..conversion.example import Example
from ..nn.fused_forward import fused_forward
from ..nn.prepacked import InPlaceActivation, PrepackedLayer, prepack
from .parts import sole_readers

Activation = Callable[[torch.Tensor], torch.Tensor]


def activate_in_place(model: nn.Module, example: Example | None) -> None:
    """Let each activation of `model` that alone reads the results of a prepacked layer write over them."""
    activations = {name: operate for name, module in model.named_modules() if (operate := _in_place(module))}
    forwards = {name: fused_forward(module) for name, module in model.named_modules()}
    layers = {name: forward for name, forward in forwards.items() if isinstance(forward, PrepackedLayer)}
    for pair in sole_readers(model, layers, activations, example):
        activation = model.get_submodule(pair.reader)
        prepack(InPlaceActivation(activation, layers[pair.producer], activations[pair.reader]))


def _in_place(module: nn.Module) -> Activation | None:
    """What the activation `module` computes, in place; None for another module, and one that is in place."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    if type(module) is nn.ReLU and not module.inplace:
        return torch.relu_
    if type(module) is nn.SiLU and not module.inplace:
        return _silu_
    if type(module) is nn.GELU:
        return partial(_gelu_, approximate=module.approximate)
    if type(module).__module__ == "transformers.activations":
        act = getattr(module, "act", None)
        if act is nn.functional.gelu:
            return _gelu_
        if isinstance(act, partial) and act.func is nn.functional.gelu:
            return partial(_gelu_, *act.args, **act.keywords)
        return _silu_ if type(module).__name__ == "SiLUActivation" else None
    return None


def _gelu_(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return torch.ops.aten.gelu_.default(x, approximate=approximate)


def _silu_(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(x, inplace=True)
