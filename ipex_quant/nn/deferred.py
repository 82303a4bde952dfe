"""Tensors that are computed when an operation needs their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map_only


class DeferredTensor(torch.Tensor):
    """A tensor that is computed when an operation needs its values.

    Code that knows a subclass can read the operands it holds instead, and nothing is computed.
    """

    _values: torch.Tensor | None = None

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> DeferredTensor:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def _compute(self) -> torch.Tensor:
        raise NotImplementedError

    def values_of(self) -> torch.Tensor:
        """Return the values as a plain tensor; they are computed once."""
        if self._values is None:
            self._values = self._compute().contiguous()  # the strides of this tensor are contiguous
        return self._values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.values_of, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return any tensor as a plain tensor."""
    return tensor.values_of() if isinstance(tensor, DeferredTensor) else tensor
