"""`InputFactor`: multiplies the input of a layer, where a checkpoint says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class InputFactor:
    """A forward pre-hook that multiplies the first argument of a layer by `factor` ``[in_features]``.

    Layers with it are not fused with others. It is no part of a state dict.
    """

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor.float()

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        return ((x * self.factor).to(x.dtype), *others)


def scaled_layers(model: nn.Module) -> list[str]:
    """Names of the modules of `model` that have an `InputFactor`."""
    return [
        name
        for name, module in model.named_modules()
        if any(isinstance(hook, InputFactor) for hook in module._forward_pre_hooks.values())
    ]
