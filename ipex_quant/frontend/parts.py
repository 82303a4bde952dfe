"""Graphs of the parts of a model that `torch.fx` can trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


def traced_parts(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, fx.Graph]]:
    """The graph of `model`, or, where fx cannot trace it, those of its largest parts that contain modules of `kinds`.

    Each comes with the prefix of the names in it. The model is the same afterwards.
    """
    with _unchanged(model):
        return list(_graphs(model, kinds, ""))


def _graphs(module: nn.Module, kinds: tuple[type[nn.Module], ...], prefix: str) -> Iterator[tuple[str, fx.Graph]]:
    try:
        yield prefix, fx.Tracer().trace(module)
    except Exception:  # whatever foreign code does with a value that it cannot know
        for name, child in module.named_children():
            if any(type(part) in kinds for part in child.modules() if part is not child):
                yield from _graphs(child, kinds, f"{prefix}{name}.")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what code that runs within the context does to attributes of `model` and of its parts."""
    before: dict[nn.Module, dict[str, Any]] = {
        module: {name: value.copy() if type(value) is dict else value for name, value in vars(module).items()}
        for module in model.modules()
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
