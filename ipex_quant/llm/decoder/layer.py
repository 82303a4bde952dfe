"""The lean decoder: one layer of a known family in few native calls.

A layer keeps its modules under their names, so that its state dict, saving and whatever walks the model stay as they
are; only its `forward` is another one.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from ...nn.fused_forward import FusedForward, fused_forward, restore_forwards
from ...ops import PostOp
from .attention import UnsuitableError, part
from .families import FAMILIES, Family, Residual
from .parts import LayerParts
from .step import layer_step

logger = logging.getLogger("ipex_quant")

_USED = ("attention_mask", "position_embeddings", "position_ids", "past_key_values", "layer_past")
_WITHOUT_EFFECT = ("use_cache", "output_hidden_states", "return_dict", "cache_position")
_KNOWN = _USED + _WITHOUT_EFFECT


def fuse_decoder(model: nn.Module) -> list[str]:
    """Let every decoder layer of `model` that is of a known family compute in few native calls; return their names.

    Call `restore_forwards` before something has to call modules one by one, such as calibration. A fused layer runs
    stock code in training mode, under autocast, where gradients or attention weights are asked for, where it gets an
    argument that it does not know, while a module within it has hooks that it did not have, and once one was replaced,
    until this is called again. Why other layers of a known family stay stock is logged.
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
    """Give `layer` a lean forward; else return why it has none."""
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
        layer.forward = _LAYERS[family.residual](layer, family)
    except UnsuitableError as error:
        return str(error)
    return None


def _holds(layer: nn.Module, family: Family) -> bool:
    return all(part(layer, path, value) == value for path, value in family.requires.items())


def _is_called(name: str, family: Family) -> bool:
    """Whether a fused layer calls this module, or the one that it is in, if it is not just a linear layer."""
    return any(name == path or name.startswith(f"{path}.") for path in family.called)


def _is_replaced(module: nn.Module) -> bool:
    """Whether what `module` computes is not what its class in transformers or torch does."""
    replaced = "forward" in vars(module) and not fused_forward(module)
    return replaced or type(module).forward.__module__.partition(".")[0] not in ("transformers", "torch")


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks that are called, besides those that transformers leaves idle."""
    return _are_hooks(module._forward_hooks) or _are_hooks(module._forward_pre_hooks)


def _are_hooks(hooks: dict[int, Any]) -> bool:
    """Whether there are `hooks` besides those that transformers leaves, which have nothing to do mostly."""
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())


def _collects_attentions() -> bool:
    """Whether transformers takes attention weights from the attention modules, which not every layer is told of."""
    collected = output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


class FusedLayer(FusedForward):
    """What is in the place of a decoder layer's `forward`, with the same arguments and results."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.layer = layer
        self.children = [parent._modules for parent in layer.modules() if parent._modules]
        self.expected_children = [dict(children) for children in self.children]
        hooks = [each for module in layer.modules() for each in (module._forward_hooks, module._forward_pre_hooks)]
        self.no_hooks = [each for each in hooks[2:] if not each]  # those of the layer itself are called in any case
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]  # after self and the hidden states
        self.parts = parts = LayerParts(layer, family)
        self.first_norm, self.second_norm, self.after = parts.first_norm, parts.second_norm, parts.after
        self.attention, self.mlp, self.cross, self.cross_norm = (
            parts.attention,
            parts.mlp,
            parts.cross,
            parts.cross_norm,
        )
        self.any_norm = next(norm for norm in parts.norms if norm)
        self.known = frozenset(_KNOWN + family.keywords)
        self.returns = family.returns
        self.clamps_float16 = family.clamps_float16
        self.step = layer_step(parts, family.residual)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs.update(zip(self.names, args, strict=False))
        if self._needs_stock(hidden_states, kwargs):
            return type(self.layer).forward(self.layer, hidden_states, **kwargs)
        result = self.step(hidden_states, kwargs) if self.step else None
        if result is None:
            result = self.compute(hidden_states, kwargs)
        return (result, *map(kwargs.get, self.returns)) if self.returns else result

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Hidden states after the layer, called with `kwargs`."""
        raise NotImplementedError

    def attends_to_encoder(self, kwargs: dict[str, Any]) -> bool:
        return self.cross is not None and kwargs.get("encoder_hidden_states") is not None

    def _needs_stock(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if self.layer.training or torch.is_autocast_enabled("cpu"):
            return True
        if self.is_changed() or (not torch.compiler.is_compiling() and _collects_attentions()):
            return True
        for name, value in kwargs.items():
            if name not in self.known and value is not None and value is not False:
                return True
        if self.clamps_float16 and hidden_states.dtype == torch.float16:
            return True
        weight = self.any_norm.module._parameters["weight"]
        if weight is not None and weight.dtype != hidden_states.dtype:  # parts of the model are in another dtype
            return True
        if not torch.is_grad_enabled():
            return False
        return hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.layer.parameters())

    def is_changed(self) -> bool:
        """Whether a module within the layer was replaced, by an adapter for instance, or has hooks that it had not."""
        if torch.compiler.is_compiling():  # which compares all this at every call, and does not watch hooks
            found = zip(self.children, self._expected_ids(), strict=True)
            return any(id(children.get(name)) != expected for children, ids in found for name, expected in ids)
        if self.children != self.expected_children:
            return True
        return any(self.no_hooks) and any(map(_are_hooks, self.no_hooks))

    @torch.compiler.assume_constant_result
    def _expected_ids(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple(tuple((name, id(child)) for name, child in each.items()) for each in self.expected_children)


class SequentialLayer(FusedLayer):
    """`Residual.SEQUENTIAL`, with attention to an encoder between the two parts where there is one."""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        x = self.attention(self.first_norm(x), kwargs, PostOp.ADD, x)
        if self.attends_to_encoder(kwargs):
            x = self.cross(self.cross_norm(x), kwargs, PostOp.ADD, x)
        return self.mlp(self.second_norm(x), PostOp.ADD, x)


class ParallelLayer(FusedLayer):
    """`Residual.PARALLEL`"""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        normed = self.first_norm(x)
        attended = self.attention(normed, kwargs)
        return self.mlp(self.second_norm(x) if self.second_norm else normed, PostOp.ADD_ADD, attended, x)


class PostNormLayer(FusedLayer):
    """`Residual.POST_NORM`, with attention to an encoder between the two parts where there is one."""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        x = self.first_norm(self.attention(x, kwargs, PostOp.ADD, x))
        if self.attends_to_encoder(kwargs):
            x = self.cross_norm(self.cross(x, kwargs, PostOp.ADD, x))
        return self.second_norm(self.mlp(x, PostOp.ADD, x))


class NormedLayer(FusedLayer):
    """`Residual.NORMED`"""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        x = self.first_norm(x)
        x = self.second_norm(self.attention(x, kwargs, PostOp.ADD, x))
        return self.mlp(x, PostOp.ADD, x)


class SandwichLayer(FusedLayer):
    """`Residual.SANDWICH`"""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        after_attention, after_mlp = self.after
        x = x + after_attention(self.attention(self.first_norm(x) if self.first_norm else x, kwargs))
        return x + after_mlp(self.mlp(self.second_norm(x) if self.second_norm else x))


_LAYERS = {
    Residual.SEQUENTIAL: SequentialLayer,
    Residual.PARALLEL: ParallelLayer,
    Residual.POST_NORM: PostNormLayer,
    Residual.NORMED: NormedLayer,
    Residual.SANDWICH: SandwichLayer,
}
