"""Norms of transformers models in one native call each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ... import ops
from ...nn.fused_forward import FusedForward, restore_forwards
from ...ops.gradient import needs_gradient


class Norm:
    """A norm as one native call; the base class is an RMS norm with `weight`."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self.module = module
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.module._parameters["weight"], self.eps)


class OffsetNorm(Norm):
    """An RMS norm that stores its weight minus 1; the product with the weight is computed in float32, then rounded."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.module._parameters["weight"].float() + 1, self.eps)


class LayerNorm(Norm):
    """A layer norm over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self.module._parameters
        return ops.layer_norm(x, parameters["weight"], parameters.get("bias"), self.eps)


class HeadNorm(Norm):
    """A layer norm over the last dimension whose weight is ``[H, D]``, or a list of layer norms for the heads."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module, nn.ModuleList):
            weight = torch.stack([norm._parameters["weight"] for norm in self.module])
        else:
            weight = self.module._parameters["weight"]
        return (ops.layer_norm(x.float(), None, None, self.eps) * weight).to(x.dtype)


class Scale:
    """Multiplication by a number, which some families have in place of a norm."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def norm_of(module: nn.Module) -> Norm | None:
    """The native form of a norm; None when there is none. Norm classes that torch lacks are told by their results.

    What such a class adds to mean squares may be any attribute of it.
    """
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(module, module.eps) if _plain(module) else None
    if isinstance(module, nn.ModuleList):
        alike = {_plain(norm) and norm.bias is None and norm.eps for norm in module}
        eps = alike.pop() if len(alike) == 1 else False
        return HeadNorm(module, eps) if eps else None
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() not in (1, 2) or weight.device.type != "cpu":
        return None
    candidates = dict.fromkeys(value for value in vars(module).values() if type(value) is float)
    if len(module._parameters) != 1 or module._modules or not candidates or isinstance(module, nn.Embedding):
        return None
    probe, size = copy.copy(module), weight.numel()
    probe.__dict__ |= {"_parameters": {"weight": torch.linspace(0.5, 2, size, dtype=torch.float32).view(weight.shape)}}
    x = torch.linspace(-3, 2, 4 * size, dtype=torch.float32).view(4, *weight.shape)
    x = torch.cat((x, x * 1e-3, x * 1e-4))  # small numbers tell what is added to their squares
    try:
        with torch.no_grad():
            expected = type(module).forward(probe, x)
            for eps in candidates:
                for kind in (Norm, OffsetNorm, LayerNorm) if weight.dim() == 1 else (HeadNorm,):
                    if torch.allclose(kind(probe, eps)(x), expected, rtol=1e-4, atol=1e-4):
                        return kind(module, eps)
    except Exception:  # its forward takes other arguments
        pass
    return None


def _plain(norm: nn.LayerNorm) -> bool:
    return type(norm).forward is nn.LayerNorm.forward and len(norm.normalized_shape) == 1


class FusedNorm(FusedForward):
    """Replaces the `forward` of a norm by one native call.

    It calls the stock forward if a gradient is needed, under autocast, and if input and weight differ in dtype.
    """

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self.norm.module
        if len(args) == 1 and not kwargs and not torch.is_autocast_enabled("cpu"):
            (x,) = args
            if x.dtype == module.weight.dtype and not needs_gradient(x, module.weight):
                return self.norm(x)
        return type(module).forward(module, *args, **kwargs)


def fuse_norms(model: nn.Module) -> list[str]:
    """Let every norm of `model` that is no torch norm compute in one native call; return their names.

    Torch's own norms are one call already. `restore_forwards` undoes it.
    """
    restore_forwards(model, FusedNorm)
    names = []
    for name, module in model.named_modules():
        stock = isinstance(module, (nn.LayerNorm, nn.ModuleList)) or "forward" in module.__dict__
        norm = None if stock else norm_of(module)
        if norm is not None:
            module.forward = FusedNorm(norm)
            names.append(name)
    return names
