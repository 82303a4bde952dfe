"""Fused replacements of a module's `forward`, which can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class FusedForward:
    """Replaces a module's `forward`; submodules and their hooks may not be called."""


def fused_forward(module: nn.Module) -> FusedForward | None:
    """The `FusedForward` that replaces the `forward` of `module`, or None."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, FusedForward) else None


def restore_forwards(model: nn.Module, *kinds: type[FusedForward]) -> None:
    """Undo the fused forwards of the given `kinds`, by default all, in every module of `model`."""
    for module in model.modules():
        if isinstance(fused_forward(module), kinds or FusedForward):
            del module.forward


@contextmanager
def restored_forwards(model: nn.Module) -> Iterator[None]:
    """Undo all fused forwards of `model` within the context, so that all submodules and hooks are called."""
    fused = {module: vars(module)["forward"] for module in model.modules() if fused_forward(module)}
    restore_forwards(model)
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.forward = forward
