"""Putting new modules in the place of old ones."""

from __future__ import annotations

import copy
import ctypes
from collections import defaultdict
from collections.abc import Callable

from torch import nn
from tqdm import tqdm

_MANY_LAYERS = 16
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def swap_modules(
    model: nn.Module, replacements: dict[str, Callable[[nn.Module], nn.Module]], inplace: bool
) -> nn.Module:
    """Replace each named module by what its function makes of it, wherever `model` refers to that module.

    New modules take over forward hooks. With `inplace` an old module is let go before the next new one is made;
    without, the result is a copy of `model`, made around the new modules.
    """
    progress = tqdm(replacements.items(), desc="quantizing", unit="layer", disable=len(replacements) < _MANY_LAYERS)
    if not inplace or "" in replacements:
        # deepcopy takes what the memo holds for an object instead of copying it.
        memo = {}
        for name, make in progress:
            module = model.get_submodule(name)
            memo[id(module)] = new = make(module)
            for hooks in _HOOKS:
                setattr(new, hooks, copy.copy(getattr(module, hooks)))
        return copy.deepcopy(model, memo)
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    for name, make in progress:
        _replace(model, names[id(model.get_submodule(name))], make)
    return_freed_memory()
    return model


def _replace(model: nn.Module, names: list[str], make: Callable[[nn.Module], nn.Module]) -> None:
    old = model.get_submodule(names[0])
    new = make(old)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for name in names:
        model.set_submodule(name, new)


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Copy of `model` with new Parameter objects over the same memory, so that modules can be replaced at no cost.

    Casting or replacing the copy's parameters does not change the caller's; writing into them does.
    """
    memo = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    return copy.deepcopy(model, memo)


def return_freed_memory() -> None:
    """Hand freed memory back to the system; glibc keeps blocks of up to 32 MB for a later that does not come here."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
