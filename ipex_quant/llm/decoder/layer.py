"""The lean decoder: one layer of a known family in few native calls.

Only the `forward` of a layer is replaced. It keeps its modules and their names, so that state dicts, saving and code
that walks the model work as before.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from ...nn.fused_forward import fused_forward, restore_forwards
from .attention import UnsuitableError, part
from .call import CallReader
from .families import FAMILIES, Family
from .parts import LayerParts
from .step import layer_step
from .watched_forward import WatchedForward, has_hooks

logger = logging.getLogger("ipex_quant")


def fuse_decoder(model: nn.Module) -> list[str]:
    """Let every decoder layer of `model` that is of a known family compute in few native calls; return their names.

    Call `restore_forwards` before calibration, or anything else that needs every module to be called. A fused layer
    runs stock code in training mode, under autocast, if gradients or attention weights are asked for, if it gets an
    argument that it does not support, while a module in it has new hooks, and after a module in it was replaced, until
    this function is called again. The log says why other layers of a known family stay stock.
    """
    restore_forwards(model, FusedLayer)
    fused = []
    for name, module in model.named_modules():
        if type(module).__name__ in FAMILIES:
            reason = _fuse(module)
            if reason is None:
                fused.append(name)
            else:
                logger.info("%s stays stock: %s", name, reason)
    return fused


def _fuse(layer: nn.Module) -> str | None:
    """Replace the forward of `layer`; return None, or the reason why it cannot be replaced."""
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    families = FAMILIES[type(layer).__name__]
    family = next((family for family in families if _holds(layer, family)), None)
    if family is None:
        return f"it has none of {[dict(family.requires) for family in families]}"
    for name, module in layer.named_modules():
        if not _is_called(name, family) and (_is_replaced(module) or (name and has_hooks(module))):
            return f"{name or 'it'} has hooks, or a forward that is not transformers'"
    try:
        layer.forward = FusedLayer(layer, family)
    except UnsuitableError as error:
        return str(error)
    return None


def _holds(layer: nn.Module, family: Family) -> bool:
    return all(part(layer, path, value) == value for path, value in family.requires.items())


def _is_called(name: str, family: Family) -> bool:
    """Whether a fused layer calls the module `name`, or a module that contains it, when it is no linear layer."""
    return any(name == path or name.startswith(f"{path}.") for path in family.called)


def _is_replaced(module: nn.Module) -> bool:
    """Whether `module` has a forward that is neither transformers' nor torch's."""
    replaced = "forward" in vars(module) and not fused_forward(module)
    return replaced or type(module).forward.__module__.partition(".")[0] not in ("transformers", "torch")


def _collects_attentions() -> bool:
    """Whether transformers captures attention weights now; no argument tells every layer of it."""
    collected = output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


class FusedLayer(WatchedForward):
    """Replaces the `forward` of a decoder layer, with the same arguments and results."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__(layer)
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]  # after self and the hidden states
        self.read = CallReader(family)
        self.returns = family.returns
        self.clamps_float16 = family.clamps_float16
        self.parts = LayerParts(layer, family)
        self.any_norm = next(norm for norm in self.parts.norms if norm)
        self.step = layer_step(self.parts)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        if args:
            given.update(zip(self.names, args, strict=False))
        call = self.read(given)
        if call is None or self.needs_stock(hidden_states):
            return self.call_stock(hidden_states, **given)
        result = self.step(hidden_states, call) if self.step else None
        if result is None:
            result = self.parts(hidden_states, call)
        return (result, *[getattr(call, name) for name in self.returns]) if self.returns else result

    def call_stock(self, hidden_states: torch.Tensor, **given: Any) -> Any:
        return type(self.module).forward(self.module, hidden_states, **given)

    def needs_stock(self, hidden_states: torch.Tensor) -> bool:
        if not torch.compiler.is_compiling() and _collects_attentions():
            return True
        if self.clamps_float16 and hidden_states.dtype == torch.float16:
            return True
        weight = self.any_norm.module._parameters["weight"]
        if weight is not None and weight.dtype != hidden_states.dtype:  # the model has mixed dtypes
            return True
        return super().needs_stock(hidden_states)
