"""The transformer blocks of a model: its towers (an encoder, a decoder, a vision model), and which run after which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..nn.linears import is_linear

Calls = dict[str, int]
"""How often one forward pass of a model calls modules, by name, in the order of their first calls."""


def find_towers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every tower of `model` by name: an ``nn.ModuleList`` of blocks with linear layers, in no block of another.

    Raises ValueError when there is none.
    """
    towers: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower in towers)
        if inside or not isinstance(module, nn.ModuleList) or any(is_linear(child) for child in module):
            continue
        if _linear_size(module):
            towers[name] = module
    if not towers:
        raise ValueError(f"model: {type(model).__name__} has no nn.ModuleList of transformer blocks with linear layers")
    return towers


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the largest tower: the one whose linears hold the most weights; ValueError without any."""
    return max(find_towers(model).items(), key=lambda item: _linear_size(item[1]))


def _linear_size(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if is_linear(m))


def count_calls(
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, torch.Tensor]],
    run: Callable[[Mapping[str, torch.Tensor]], object],
) -> list[Calls]:
    """Count the calls of each of `modules` in ``run(batch)``, a result per batch; equal shapes share one run."""
    known: dict[tuple[object, ...], Calls] = {}
    counts: list[Calls] = []
    for batch in batches:
        shapes = tuple((name, getattr(value, "shape", None)) for name, value in batch.items())
        if shapes not in known:
            known[shapes] = _calls_of_one_run(modules, lambda batch=batch: run(batch))
        counts.append(known[shapes])
    return counts


def _calls_of_one_run(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> Calls:
    calls: Calls = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    handles = [m.register_forward_pre_hook(lambda *_, name=name: count(name)) for name, m in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def merged_order(sequences: Iterable[Iterable[str]]) -> list[str]:
    """Merge `sequences` of names into one order; where two disagree, the earlier sequence decides."""
    order: list[str] = []
    for sequence in sequences:
        place = len(order)
        for name in reversed(list(sequence)):
            if name in order:
                place = order.index(name)
            else:
                order.insert(place, name)
    return order


def holder(tower: str, order: Sequence[str], counts: Sequence[Calls]) -> str | None:
    """Outermost module that contains `tower` and whose outputs can replace it in later runs; None without one.

    The module contains no block that runs after the tower's blocks, and every batch that runs one of these calls it.
    `order` lists the blocks of all towers in the order in which they run.
    """
    own = [name for name in order if name.startswith(f"{tower}.")]
    later = order[order.index(own[-1]) + 1 :]
    parts = tower.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        alone = not any(each.startswith(f"{name}.") for each in later)
        if alone and all(name in calls for calls in counts if not calls.keys().isdisjoint(own)):
            return name
    return None


def patterns(model: nn.Module, names: Iterable[str]) -> list[str]:
    """`names` of modules with the index in every ``nn.ModuleList`` replaced by a star, each pattern once."""
    return list(dict.fromkeys(pattern(model, name) for name in names))


def pattern(model: nn.Module, name: str) -> str:
    """`name` with the index in every ``nn.ModuleList`` replaced by a star: one pattern for all blocks or experts."""
    parts = name.split(".")
    parents = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return ".".join("*" if isinstance(p, nn.ModuleList) else part for p, part in zip(parents, parts, strict=True))
