"""SmoothQuant's pairs of observers, of an activation and of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .foreign import describe_observer, has_data, observe, reduce_observer
from .histogram import HistogramObserver
from .minmax import PerChannelMinMaxObserver
from .observer import ObserverFactory

ObserverMaker = Callable[[], nn.Module]


class _Pair(nn.Module):
    """Holds a plain observer (of the whole tensor or its output channels), one of the input channels, and `alpha`.

    `smooth_quant_enabled` selects the observer of the input channels; otherwise the plain one observes.
    """

    plain: str
    """Attribute that holds the observer for layers without smoothing."""

    def __init__(self, alpha: float, smooth_quant_enabled: bool) -> None:
        super().__init__()
        self.alpha = checked_alpha(alpha)
        self.smooth_quant_enabled = smooth_quant_enabled

    @classmethod
    def with_args(cls, **kwargs: Any) -> ObserverFactory:
        """A factory of this class with the arguments `kwargs`."""
        return ObserverFactory(cls, **kwargs)

    @property
    def active(self) -> nn.Module:
        """The observer in use: `ic_obs` when the layer is smoothed, else the plain one."""
        return self.ic_obs if self.smooth_quant_enabled else getattr(self, self.plain)

    @property
    def has_data(self) -> bool:
        return has_data(self.active)

    @property
    def min_val(self) -> torch.Tensor:
        return self.active.min_val

    @property
    def max_val(self) -> torch.Tensor:
        return self.active.max_val

    def reset(self) -> None:
        """Clear the statistics of every observer that has a `reset`."""
        for observer in self.children():
            if hasattr(observer, "reset"):
                observer.reset()

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point without smoothing; with it, they depend on the other operand as well."""
        return getattr(self, self.plain).calculate_qparams()

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Combine the statistics of all ranks of `group`; TypeError when the active observer has no reduction."""
        reduce_observer(self.active, group)

    def _describe(self, **observers: nn.Module) -> dict[str, Any]:
        plain = getattr(self, self.plain)
        return {
            "name": type(self).__name__,
            "smooth_quant_enabled": self.smooth_quant_enabled,
            "dtype": str(plain.dtype),
            "qscheme": str(plain.qscheme),
            "reduce_range": plain.reduce_range,
            "quant_min": plain.quant_min,
            "quant_max": plain.quant_max,
            "alpha": self.alpha,
            **{name: describe_observer(observer) for name, observer in observers.items()},
        }


class SmoothQuantActivationObserver(_Pair):
    """Observes an activation ``[..., K]``: `ic_obs` its channels if the layer is smoothed, else `act_obs` all of it.

    `act_observer` and `act_ic_observer` are classes or factories, ours or torch.ao's. Raises TypeError or ValueError
    for an alpha outside [0, 1], for an observer that is not a factory, and for a per-channel one of another axis.
    """

    plain = "act_obs"

    def __init__(
        self,
        alpha: float = 0.5,
        act_observer: ObserverMaker | None = None,
        act_ic_observer: ObserverMaker | None = None,
        smooth_quant_enabled: bool = True,
    ) -> None:
        super().__init__(alpha, smooth_quant_enabled)
        self.act_obs = _made("act_observer", act_observer or HistogramObserver)
        default = PerChannelMinMaxObserver.with_args(ch_axis=-1)
        self.ic_obs = _made("act_ic_observer", act_ic_observer or default, ch_axes=(-1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the float `x` ``[..., K]`` into the statistics and return it; ValueError when it holds NaN or Inf."""
        # Flat, since users give ch_axis=1 for the features, as if every activation were a matrix.
        observe(self.active, x.reshape(-1, x.shape[-1]) if self.smooth_quant_enabled else x)
        return x

    def describe(self) -> dict[str, Any]:
        """The pair's entry in the summary file."""
        return self._describe(act_observer=self.act_obs, act_ic_observer=self.ic_obs)


class SmoothQuantWeightObserver(_Pair):
    """Observes a weight ``[N, K]``: `ic_obs` its K columns if the layer is smoothed, else `oc_obs` its N rows.

    `wei_observer` and `wei_ic_observer` are classes or factories, ours or torch.ao's; errors are those of
    `SmoothQuantActivationObserver`.
    """

    plain = "oc_obs"

    def __init__(
        self,
        alpha: float = 0.5,
        wei_observer: ObserverMaker | None = None,
        wei_ic_observer: ObserverMaker | None = None,
        smooth_quant_enabled: bool = True,
    ) -> None:
        super().__init__(alpha, smooth_quant_enabled)
        rows = PerChannelMinMaxObserver.with_args(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
        columns = PerChannelMinMaxObserver.with_args(ch_axis=1, dtype=torch.qint8)
        self.oc_obs = _made("wei_observer", wei_observer or rows)
        self.ic_obs = _made("wei_ic_observer", wei_ic_observer or columns, ch_axes=(1, -1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Take `weight` into the statistics and return it; ValueError when it holds NaN or Inf."""
        observe(self.active, weight)
        return weight

    def describe(self) -> dict[str, Any]:
        """The pair's entry in the summary file."""
        return self._describe(wei_observer=self.oc_obs, wei_ic_observer=self.ic_obs)


def checked_alpha(alpha: float) -> float:
    """`alpha` as a float; TypeError when it is not a number, ValueError when it is not in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    return float(alpha)


def _made(argument: str, factory: ObserverMaker, ch_axes: tuple[int, ...] | None = None) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{argument}: expected an observer class or factory (MinMaxObserver.with_args(...)), got {factory!r}"
        )
    observer = factory()
    if ch_axes is not None and getattr(observer, "ch_axis", None) not in ch_axes:
        raise ValueError(f"{argument}: expected a per-channel observer with ch_axis {ch_axes[0]}, got {observer!r}")
    return observer
