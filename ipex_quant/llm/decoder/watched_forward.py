"""A replaced `forward` that notices when its module is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from ...nn.fused_forward import FusedForward


class WatchedForward(FusedForward):
    """Replaces the `forward` of `module` until a module in it is replaced or gets a hook."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.children = [parent._modules for parent in module.modules() if parent._modules]
        self.expected_children = [dict(children) for children in self.children]
        hooks = [each for part in module.modules() for each in (part._forward_hooks, part._forward_pre_hooks)]
        self.no_hooks = [each for each in hooks[2:] if not each]  # those of the module itself are called in any case

    def is_changed(self) -> bool:
        """Whether a module in the module was replaced, by an adapter for instance, or has new hooks."""
        if torch.compiler.is_compiling():  # its guards compare all this at every call, and ignore hooks
            found = zip(self.children, self._expected_ids(), strict=True)
            return any(id(children.get(name)) != expected for children, ids in found for name, expected in ids)
        if self.children != self.expected_children:
            return True
        return any(self.no_hooks) and any(map(are_hooks, self.no_hooks))

    @torch.compiler.assume_constant_result
    def _expected_ids(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple(tuple((name, id(child)) for name, child in each.items()) for each in self.expected_children)

    def needs_stock(self, x: torch.Tensor) -> bool:
        """Whether the module's own forward must compute `x`: for training, gradients, autocast, or after a change."""
        if self.module.training or torch.is_autocast_enabled("cpu") or self.is_changed():
            return True
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(parameter.requires_grad for parameter in self.module.parameters())


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks, besides the idle ones that transformers installs."""
    return are_hooks(module._forward_hooks) or are_hooks(module._forward_pre_hooks)


def are_hooks(hooks: dict[int, Any]) -> bool:
    """Whether there are `hooks` besides those that transformers installs to capture outputs, which mostly are idle."""
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())
