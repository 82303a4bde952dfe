"""Replacing modules of a model."""

from __future__ import annotations

import copy
import ctypes
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from ..nn.multihead_attention import named_layers, split_attentions

_MANY_LAYERS = 16
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def swap_modules(model: nn.Module, replacements: dict[str, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """Replace each named module by the result of its function, under all names that `model` has for the module.

    New modules take over the forward hooks. An old module is released before the next new one is made. Returns `model`,
    or its replacement if it is itself replaced.
    """
    if "" in replacements:
        return successor(model, replacements[""])
    progress = tqdm(replacements.items(), desc="quantizing", unit="layer", disable=len(replacements) < _MANY_LAYERS)
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    for name, make in progress:
        same = names[id(model.get_submodule(name))]
        new = successor(model.get_submodule(name), make)
        for each in same:
            model.set_submodule(each, new)
    return_freed_memory()
    return model


def successor(old: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What `make` returns for `old`, with the hooks of `old`."""
    new = make(old)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    return new


def copy_on_write(model: nn.Module) -> nn.Module:
    """Copy of `model` whose parameters share its memory until one of the two is written to.

    Parameters whose memory torch did not allocate, such as those mapped from a file, are copied at once.
    """
    memo = {
        id(p): nn.Parameter(_lazy_clone(p.detach()), p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter
    }
    return copy.deepcopy(model, memo)


def _lazy_clone(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory of another allocator
        return tensor.clone()


def with_split_attentions(model: nn.Module) -> nn.Module:
    """`model`; if it has attention modules to split, a copy on write with them split."""
    names = {name for name, _ in named_layers(model)} - {name for name, _ in model.named_modules()}
    return split_attentions(copy_on_write(model), names) if names else model


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc would keep blocks of up to 32 MB for later allocations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
