"""Modules that compute in another way than their class does, which can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class FusedForward:
    """Stands in for a module's `forward`; the modules within it may not be called, nor their hooks."""


def fused_forward(module: nn.Module) -> FusedForward | None:
    """The object that stands in for the `forward` of `module`, if it is fused."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, FusedForward) else None


def restore_forwards(model: nn.Module, *kinds: type[FusedForward]) -> None:
    """Let every module of `model` that one of the `kinds` computes, by default any, be computed by its class again."""
    for module in model.modules():
        if isinstance(fused_forward(module), kinds or FusedForward):
            del module.forward


@contextmanager
def restored_forwards(model: nn.Module) -> Iterator[None]:
    """Let every module of `model` be computed by its class for a while, so that all modules and hooks are called."""
    fused = {module: vars(module)["forward"] for module in model.modules() if fused_forward(module)}
    restore_forwards(model)
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.forward = forward
