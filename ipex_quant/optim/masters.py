"""Float32 values of parameters that a model holds in a lower precision.

A master belongs to one parameter. The modules that own the parameter (several, where weights are tied) and the
optimizer refer to the same master: modules save and load its value, the optimizer updates it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn

from ..numerics.halves import join_float32, split_float32
from ..ops.halves import join_halves, split_halves
from .layout import aligned

_MASTERS = "_float32_masters"  # attribute of modules

Parts = tuple[torch.Tensor, ...]
"""The same elements of the tensors that hold a master, flat."""


class Master(ABC):
    """The float32 value of `param`, which holds it rounded."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self._saved: ref[torch.Tensor] | None = None

    @abstractmethod
    def value(self) -> torch.Tensor:
        """The float32 value, without a gradient."""

    @abstractmethod
    def assign(self, value: torch.Tensor) -> None:
        """Change the master to float32 `value` and the parameter with it, both in place."""

    @abstractmethod
    def tensors(self) -> Parts:
        """The tensors that hold the value, in the order of the parameter's memory."""

    @staticmethod
    @abstractmethod
    def read(parts: Sequence[Parts], scratch: torch.Tensor) -> list[torch.Tensor]:
        """The float32 values of `parts` of `tensors`, shared with them or in flat float32 `scratch` of their size."""

    @staticmethod
    @abstractmethod
    def write(parts: Sequence[Parts], values: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
        """Store what `read` gave, after it was changed."""

    def value_in(self, state_dict: Mapping[str, Any]) -> torch.Tensor:
        """The value for one more entry of `state_dict`: the same tensor under all names of a tied weight."""
        saved = self._saved and self._saved()
        if saved is None or not any(entry is saved for entry in state_dict.values()):
            saved = self.value()
            self._saved = ref(saved)
        return saved

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_saved": None}


class SplitMaster(Master):
    """Two halves of 16 bits: the parameter, which becomes bfloat16, and `low` (int16)."""

    def __init__(self, param: nn.Parameter) -> None:
        super().__init__(param)
        param.data, self.low = split_float32(param.detach())

    def value(self) -> torch.Tensor:
        return join_float32(self.param, self.low)

    def assign(self, value: torch.Tensor) -> None:
        high, low = split_float32(value)
        with torch.no_grad():
            self.param.copy_(high)
        self.low.copy_(low)

    def tensors(self) -> Parts:
        self.low = aligned(self.low, self.param)
        return self.param.detach(), self.low

    @staticmethod
    def read(parts: Sequence[Parts], scratch: torch.Tensor) -> list[torch.Tensor]:
        join_halves(*_columns(parts), scratch)
        return list(scratch.split([high.numel() for high, _ in parts]))

    @staticmethod
    def write(parts: Sequence[Parts], values: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
        split_halves(scratch, *_columns(parts))


class FullMaster(Master):
    """A float32 tensor `full` beside the parameter, which becomes `dtype`."""

    def __init__(self, param: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__(param)
        self.full = param.detach()
        param.data = self.full.to(dtype)

    def value(self) -> torch.Tensor:
        return self.full

    def assign(self, value: torch.Tensor) -> None:
        if value is not self.full:
            self.full.copy_(value)
        with torch.no_grad():
            self.param.copy_(self.full)

    def tensors(self) -> Parts:
        self.full = aligned(self.full, self.param)
        return self.param.detach(), self.full

    @staticmethod
    def read(parts: Sequence[Parts], scratch: torch.Tensor) -> list[torch.Tensor]:
        return [full for _, full in parts]

    @staticmethod
    def write(parts: Sequence[Parts], values: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
        torch._foreach_copy_([param for param, _ in parts], list(values))


class OwnMaster(Master):
    """The parameter itself, which has no other value: float32, float64, or rounded by each update."""

    def value(self) -> torch.Tensor:
        return self.param.detach()

    def assign(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.param.copy_(value)

    def tensors(self) -> Parts:
        return (self.param.detach(),)

    @staticmethod
    def read(parts: Sequence[Parts], scratch: torch.Tensor) -> list[torch.Tensor]:
        params = [param for (param,) in parts]
        if params[0].dtype == scratch.dtype:
            return params
        values = list(scratch.split([param.numel() for param in params]))
        torch._foreach_copy_(values, params)
        return values

    @staticmethod
    def write(parts: Sequence[Parts], values: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
        if parts[0][0].dtype != scratch.dtype:
            torch._foreach_copy_([param for (param,) in parts], list(values))


def _columns(parts: Sequence[Parts]) -> list[list[torch.Tensor]]:
    return [list(column) for column in zip(*parts, strict=True)]


def masters_of(module: nn.Module) -> dict[str, Master]:
    """The masters of the parameters that `module` itself holds, by the parameter's name."""
    masters = getattr(module, _MASTERS, {})
    return {name: m for name, m in masters.items() if getattr(module, name, None) is m.param}


def attach_master(module: nn.Module, name: str, master: Master) -> None:
    """Let `module` save the float32 value of its parameter `name` in its `state_dict`, and load both from one.

    What is attached is copied and pickled with the module.
    """
    if not hasattr(module, _MASTERS):
        setattr(module, _MASTERS, {})
        module.register_state_dict_post_hook(_save_values)
        module.register_load_state_dict_pre_hook(_load_values)
    getattr(module, _MASTERS)[name] = master


def _save_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, master in masters_of(module).items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = master.value_in(state_dict)


def _load_values(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    if local_metadata.get("assign_to_params_buffers"):  # the parameter is about to be replaced
        return
    for name, master in masters_of(module).items():
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and value.shape == master.param.shape:
            master.assign(value.to(torch.float32))
            state_dict[prefix + name] = master.param.detach()  # what the module copies is there already
