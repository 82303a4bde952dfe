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

from ...nn.fused_forward import FusedForward, fused_forward, restore_forwards
from .attention import UnsuitableError, part
from .call import CallReader
from .families import FAMILIES, Family
from .parts import LayerParts
from .step import layer_step

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


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks, besides the idle ones that transformers installs."""
    return _are_hooks(module._forward_hooks) or _are_hooks(module._forward_pre_hooks)


def _are_hooks(hooks: dict[int, Any]) -> bool:
    """Whether there are `hooks` besides those that transformers installs to capture outputs, which mostly are idle."""
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())


def _collects_attentions() -> bool:
    """Whether transformers captures attention weights now; no argument tells every layer of it."""
    collected = output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


class FusedLayer(FusedForward):
    """Replaces the `forward` of a decoder layer, with the same arguments and results."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.layer = layer
        self.children = [parent._modules for parent in layer.modules() if parent._modules]
        self.expected_children = [dict(children) for children in self.children]
        hooks = [each for module in layer.modules() for each in (module._forward_hooks, module._forward_pre_hooks)]
        self.no_hooks = [each for each in hooks[2:] if not each]  # those of the layer itself are called in any case
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
        if call is None or self._needs_stock(hidden_states):
            return self.call_stock(hidden_states, **given)
        result = self.step(hidden_states, call) if self.step else None
        if result is None:
            result = self.parts(hidden_states, call)
        return (result, *[getattr(call, name) for name in self.returns]) if self.returns else result

    def call_stock(self, hidden_states: torch.Tensor, **given: Any) -> Any:
        return type(self.layer).forward(self.layer, hidden_states, **given)

    def _needs_stock(self, hidden_states: torch.Tensor) -> bool:
        if self.layer.training or torch.is_autocast_enabled("cpu"):
            return True
        if self.is_changed() or (not torch.compiler.is_compiling() and _collects_attentions()):
            return True
        if self.clamps_float16 and hidden_states.dtype == torch.float16:
            return True
        weight = self.any_norm.module._parameters["weight"]
        if weight is not None and weight.dtype != hidden_states.dtype:  # the model has mixed dtypes
            return True
        if not torch.is_grad_enabled():
            return False
        return hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.layer.parameters())

    def is_changed(self) -> bool:
        """Whether a module in the layer was replaced, by an adapter for instance, or has new hooks."""
        if torch.compiler.is_compiling():  # its guards compare all this at every call, and ignore hooks
            found = zip(self.children, self._expected_ids(), strict=True)
            return any(id(children.get(name)) != expected for children, ids in found for name, expected in ids)
        if self.children != self.expected_children:
            return True
        return any(self.no_hooks) and any(map(_are_hooks, self.no_hooks))

    @torch.compiler.assume_constant_result
    def _expected_ids(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple(tuple((name, id(child)) for name, child in each.items()) for each in self.expected_children)
