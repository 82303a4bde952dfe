"""Finds, in one run, the modules that consume the same tensor, and the tensors that only one such group reads."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_METADATA = frozenset(
    (
        *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "size", "dim", "numel", "stride"),
        *(
            "is_cpu",
            "is_cuda",
            "is_meta",
            "is_contiguous",
            "is_floating_point",
            "is_complex",
            "is_nested",
            "element_size",
        ),
        *("__len__", "__hash__"),
    )
)
"""Attributes and methods of a tensor that do not read its values."""


@dataclass(frozen=True)
class SharedInput:
    """One or more modules with the same parent that consume the same tensor of `rank` dimensions, in call order.

    `producer` is the module that outputs the tensor if only the members read it; else None.
    """

    members: tuple[str, ...]
    producer: str | None = None
    rank: int = 0


@dataclass
class _Tensor:
    """A tensor of the run; the reference to it keeps Python from reusing its id."""

    value: torch.Tensor
    producer: str | None = None
    consumers: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    private: bool = True  # only consumers have read it

    @property
    def is_kept(self) -> bool:
        """Whether anything but this record refers to the tensor."""
        return sys.getrefcount(self.value) > 2  # the references of `self` and of this call


def input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first tensor that a module is called with, positional or not."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


@torch.no_grad()
def trace_groups(
    model: nn.Module, consumers: Collection[str], producers: Collection[str], run: Callable[[], Any]
) -> list[SharedInput]:
    """Groups of the modules named `consumers`, in the order of their calls, while ``run()`` runs `model`.

    Modules that `run` does not reach are left out. A module that is called more than once is alone in its group; so are
    the consumers of a tensor that was written to between their calls. `producers` names the modules whose outputs are
    watched.
    """
    recorder = _Recorder({id(p): name for name in producers for p in model.get_submodule(name).parameters()})
    handles = []
    try:
        for name, module in model.named_modules():
            if name in consumers:
                enter = partial(recorder.enter, name)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if name in producers:
                handles.append(module.register_forward_pre_hook(recorder.watch))
            # Always called, so that an exception cannot leave the recorder inside a consumer.
            leave = partial(recorder.leave, name, name in consumers, name in producers)
            handles.append(module.register_forward_hook(leave, always_call=True))
        with recorder, _Operators(recorder):
            output = run()
        recorder.mark_kept()
        del output  # alive until here, so that its tensors count as kept
    finally:
        for handle in handles:
            handle.remove()
    return list(_groups(list(recorder.tensors.values()), recorder.exposed))


def _groups(tensors: Sequence[_Tensor], exposed: Collection[str]) -> Iterator[SharedInput]:
    calls = Counter(name for tensor in tensors for name in tensor.consumers)
    outputs = Counter(tensor.producer for tensor in tensors)
    grouped: set[str] = set()
    for tensor in tensors:
        unchanged = len(tensor.versions) <= 1
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for name in tensor.consumers if name not in grouped):
            together = unchanged and calls[name] == 1
            groups.setdefault(f"{name.rpartition('.')[0]}.*" if together else name, []).append(name)
        grouped.update(tensor.consumers)
        private = tensor.private and unchanged and len(groups) == 1 and outputs[tensor.producer] == 1
        private = private and tensor.producer not in exposed
        for members in groups.values():
            yield SharedInput(tuple(members), tensor.producer if private else None, tensor.value.dim())


class _Recorder(TorchFunctionMode):
    """Records the calls of watched modules, and the tensors that torch functions outside of consumers read."""

    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.tensors: dict[int, _Tensor] = {}
        self.exposed: set[str] = set()  # producers whose parameters other code reads
        self._parameters = parameters  # names of producers by the ids of their parameters
        self._producing = 0  # calls of producers in progress
        self._inside = 0  # calls of consumers in progress; functions inside them may read anything

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        value = input_tensor(args, kwargs)
        if value is not None and self._inside == 1:
            tensor = self.tensors.setdefault(id(value), _Tensor(value))
            tensor.consumers.append(name)
            if not value.is_inference():
                tensor.versions.add(value._version)

    def watch(self, module: nn.Module, args: Any) -> None:
        self._producing += 1

    def leave(self, name: str, consumes: bool, produces: bool, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= consumes
        self._producing -= produces
        if produces and isinstance(output, torch.Tensor):
            tensor = self.tensors.setdefault(id(output), _Tensor(output))
            tensor.producer = name
        else:
            self._mark(tree_leaves(output))  # a module that hands a tensor on makes it public

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(func, "__name__", "")
        if name not in _METADATA:
            self.read((args, kwargs))
        return func(*args, **kwargs)

    def read(self, arguments: Any) -> None:
        """Mark the tensors that code outside of consumers reads as not private.

        Producers whose parameters are read outside of any producer become exposed.
        """
        if self._inside:
            return
        leaves = tree_leaves(arguments)
        self._mark(leaves)
        if not self._producing:
            self.exposed.update(self._parameters[id(leaf)] for leaf in leaves if id(leaf) in self._parameters)

    def mark_kept(self) -> None:
        """Mark tensors as not private if an attribute or the run's result refers to them: code may read them later."""
        for tensor in self.tensors.values():
            if tensor.is_kept:
                tensor.private = False

    def _mark(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and id(value) in self.tensors:
                self.tensors[id(value)].private = False


class _Operators(TorchDispatchMode):
    """Passes the arguments of every operator to the recorder; compiled code calls operators without torch functions."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recorder.read((args, kwargs))
        return func(*args, **(kwargs or {}))
