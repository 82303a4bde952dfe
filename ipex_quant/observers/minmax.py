"""Observers of minimum and maximum: of the whole tensor, as a moving average, and per channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .observer import PER_CHANNEL, Observer, check_finite, float_values, reduce_max


class MinMaxObserver(Observer):
    """Minimum and maximum of all values seen; float tensors of any shape, `min_val` and `max_val` are scalars."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel():
            self._widen(*torch.aminmax(float_values(x)))
        return x


class MovingAverageMinMaxObserver(Observer):
    """Moving averages of the minima and maxima of the tensors seen, each new one weighted by `averaging_constant`.

    ``min = min + c * (min(x) - min)``, starting with the first tensor's, as torch.ao does.
    """

    def __init__(self, averaging_constant: float = 0.01, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averaging_constant = averaging_constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        low, high = (bound.float() for bound in torch.aminmax(float_values(x)))
        if not self.has_data:
            self._widen(low, high)
        else:
            check_finite(low, high)
            self.min_val = self.min_val + self.averaging_constant * (low - self.min_val)
            self.max_val = self.max_val + self.averaging_constant * (high - self.max_val)
        return x

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Raises TypeError: a moving average depends on the order of batches, which ranks do not share."""
        raise TypeError(
            f"{type(self).__name__}: a moving average depends on the order of batches, so that ranks cannot share it; "
            "use MinMaxObserver or HistogramObserver, or calibrate in one process"
        )

    def _own_arguments(self) -> dict[str, Any]:
        return {"averaging_constant": self.averaging_constant}


class PerChannelMinMaxObserver(Observer):
    """Minimum and maximum per index of the axis `ch_axis`; `min_val` and `max_val` are ``[channels]``, at first empty.

    ValueError when a tensor has another number of channels than earlier ones, or no such axis.
    """

    QSCHEMES = PER_CHANNEL

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype, qscheme, **kwargs)
        self.ch_axis = ch_axis

    def reset(self) -> None:
        """Clear the statistics."""
        self.register_buffer("min_val", torch.empty(0, dtype=torch.float32))
        self.register_buffer("max_val", torch.empty(0, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        if not -x.dim() <= self.ch_axis < x.dim():
            raise ValueError(f"expected a tensor with an axis {self.ch_axis}, got shape {list(x.shape)}")
        channels = x.shape[self.ch_axis]
        if self.min_val.numel() not in (0, channels):
            raise ValueError(
                f"expected {self.min_val.numel()} channels along axis {self.ch_axis}, got shape {list(x.shape)}"
            )
        values = float_values(x).movedim(self.ch_axis, -1).reshape(-1, channels)
        # Two passes: torch's amin and amax are five times faster than its aminmax along an axis.
        low, high = values.amin(0), values.amax(0)
        if self.min_val.numel() == 0:
            check_finite(low, high)
            self._set_channels(channels)
        self._widen(low, high)
        return x

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Combine the statistics of all ranks of `group`; ValueError on all of them when their channels differ."""
        own = self.min_val.numel()
        # Largest and negated smallest number of channels over the ranks that saw data.
        largest, smallest = reduce_max(torch.tensor([own, -own if own else -(2**31)]), group).tolist()
        if largest == 0:
            return
        if -smallest != largest:
            raise ValueError(f"{type(self).__name__}: ranks saw tensors of {-smallest} to {largest} channels")
        if own == 0:
            self._set_channels(largest)
        super().reduce(group)

    def _set_channels(self, channels: int) -> None:
        self.min_val = self.min_val.new_full((channels,), torch.inf)
        self.max_val = self.max_val.new_full((channels,), -torch.inf)

    def _own_arguments(self) -> dict[str, Any]:
        return {"ch_axis": self.ch_axis}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A new observer has no channels yet: the state sets their number.
        if prefix + "min_val" in state_dict:
            self._set_channels(state_dict[prefix + "min_val"].numel())
        super()._load_from_state_dict(state_dict, prefix, *args)
