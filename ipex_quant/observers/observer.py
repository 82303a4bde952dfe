"""`Observer`: the base of all observers, with torch's formulas for quantization parameters."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..numerics.affine import find_scales

PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)

_QUANT_RANGES = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
_MIDDLE = {torch.quint8: 128, torch.qint8: 0}


class ObserverFactory(functools.partial):
    """A callable that makes observers; `with_args` returns one with further arguments.

    It can be pickled and copied.
    """

    def with_args(self, **kwargs: Any) -> ObserverFactory:
        return ObserverFactory(self, **kwargs)


class Observer(nn.Module):
    """Collects the range of the tensors it sees; base of the observers.

    Buffers `min_val` and `max_val` stay float32 when the module is cast. `quant_min` and `quant_max` default to the
    range of `dtype` (torch.quint8 or torch.qint8); `reduce_range` halves them. `eps` is the least scale. By default
    only an all-zero range gets float32's eps as its scale, because torch's default, eps for all, rounds small values
    to 0. `is_dynamic` is only recorded. Raises ValueError for another dtype, for a `qscheme` that the class does not
    support, and unless ``quant_min <= 0 < quant_max`` with at most 256 levels.
    """

    QSCHEMES = PER_TENSOR

    min_val: torch.Tensor
    max_val: torch.Tensor
    quant_min: int
    quant_max: int

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if dtype not in _QUANT_RANGES:
            raise ValueError(f"{name}: dtype: expected torch.quint8 or torch.qint8, got {dtype}")
        if qscheme not in self.QSCHEMES:
            expected = " or ".join(map(str, self.QSCHEMES))
            raise ValueError(f"{name}: qscheme: expected {expected}, got {qscheme}")
        self.dtype = dtype
        self.qscheme = qscheme
        self.reduce_range = reduce_range
        self.eps = eps
        self.is_dynamic = is_dynamic
        self.has_customized_qrange = quant_min is not None and quant_max is not None
        self.quant_min, self.quant_max = _QUANT_RANGES[dtype]
        if quant_min is not None and quant_max is not None:
            self.quant_min, self.quant_max = quant_min, quant_max
        if not self.quant_min <= 0 < self.quant_max or self.quant_max - self.quant_min > 255:
            raise ValueError(
                f"{name}: expected quant_min <= 0 < quant_max with at most 256 levels, got {quant_min} and {quant_max}"
            )
        if reduce_range:  # one bit less
            self.quant_min, self.quant_max = self.quant_min // 2, self.quant_max // 2
        self.reset()

    @classmethod
    def with_args(cls, **kwargs: Any) -> ObserverFactory:
        """A factory of this class with the arguments `kwargs`."""
        return ObserverFactory(cls, **kwargs)

    @property
    def has_data(self) -> bool:
        """Whether the observer has seen any value."""
        return self.min_val.numel() > 0 and bool(torch.isfinite(self.min_val).all())

    def reset(self) -> None:
        """Clear the statistics."""
        self.register_buffer("min_val", torch.tensor(torch.inf, dtype=torch.float32))
        self.register_buffer("max_val", torch.tensor(-torch.inf, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the float tensor `x` into the statistics and return it; ValueError when it holds NaN or Inf."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale float32 and zero point int32, ``[1]`` or ``[channels]``, as torch computes them from the range.

        RuntimeError when the observer has seen no value.
        """
        self._require_data()
        return self._affine(self.min_val.reshape(-1), self.max_val.reshape(-1))

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Combine the statistics of all ranks of `group`, so that each rank holds those of all the data."""
        # Adding zero turns the -0.0 of the negation into 0.0.
        self.min_val = -reduce_max(-self.min_val, group) + 0.0
        self.max_val = reduce_max(self.max_val, group)

    def describe(self) -> dict[str, Any]:
        """The observer's entry in the summary file: its class and arguments, as JSON values."""
        return {
            "name": type(self).__name__,
            **self._own_arguments(),
            "dtype": str(self.dtype),
            "qscheme": str(self.qscheme),
            "reduce_range": self.reduce_range,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "is_dynamic": self.is_dynamic,
        }

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, qscheme={self.qscheme}, has_data={self.has_data}"

    def _own_arguments(self) -> dict[str, Any]:
        return {}

    def _require_data(self) -> None:
        if not self.has_data:
            raise RuntimeError(f"{type(self).__name__} has seen no data; run calibration first")

    def _affine(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Torch's rule, elementwise, from ranges float32 to scales float32 and zero points int32."""
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        steps = float(self.quant_max - self.quant_min)
        if self.qscheme in SYMMETRIC:
            scale = self._scale(torch.maximum(-low, high), steps / 2)
            middle = (self.quant_min + self.quant_max) // 2 if self.has_customized_qrange else _MIDDLE[self.dtype]
            code = middle if self.dtype == torch.quint8 else 0
            return scale, torch.full_like(scale, code, dtype=torch.int32)
        scale = self._scale(high - low, steps)
        zero_point = self.quant_min - torch.round(low / scale).to(torch.int32)
        return scale, zero_point.clamp(self.quant_min, self.quant_max)

    def _scale(self, span: torch.Tensor, steps: float) -> torch.Tensor:
        return find_scales(span, steps) if self.eps is None else (span / steps).clamp(min=self.eps)

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        check_finite(low, high)
        # Adding zero turns -0.0 into 0.0, which keeps the bits independent of the order of batches.
        self.min_val = torch.minimum(self.min_val, low.float() + 0.0)
        self.max_val = torch.maximum(self.max_val, high.float() + 0.0)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Outside of inference mode, torch cannot write to buffers made in it, but to their clones.
        self._buffers.update({name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Observer:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():  # casting the model must not round its statistics
            self._buffers[name] = buffer.to(self.get_buffer(name).device)
        return self


def check_finite(low: torch.Tensor, high: torch.Tensor) -> None:
    """ValueError unless the bounds `low` and `high` of a tensor are finite; NaN in a tensor reaches its bounds."""
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("expected finite values, got NaN or Inf")


def float_values(x: torch.Tensor) -> torch.Tensor:
    """`x` without its graph, in a dtype that holds its values and float32's; TypeError when `x` is not a float."""
    if not x.is_floating_point():
        raise TypeError(f"expected a float tensor, got {x.dtype}")
    return x.detach().float() if x.dtype in (torch.float64, torch.float16) else x.detach()


def reduce_max(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The elementwise maximum of `values` over the ranks of `group`, in a new tensor."""
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values
