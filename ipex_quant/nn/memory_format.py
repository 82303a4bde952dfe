"""Convolutions whose weights, and with them their results, are channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FORMATS: dict[type[nn.Module], torch.memory_format] = {
    nn.Conv2d: torch.channels_last,
    nn.ConvTranspose2d: torch.channels_last,
    nn.Conv3d: torch.channels_last_3d,
    nn.ConvTranspose3d: torch.channels_last_3d,
}


class _Setting:
    automatic: bool | None = None  # what was asked for


def auto_channels_last(default: bool = True) -> bool:
    """Whether convolutions are to be laid out channels last: what `set_auto_channels_last` said, else `default`."""
    return default if _Setting.automatic is None else _Setting.automatic


def set_auto_channels_last(automatic: bool | None) -> None:
    """Change what `auto_channels_last` returns, for the process; with None back to its defaults."""
    _Setting.automatic = automatic


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether `x` is channels last and not, as with a single channel or place, in torch's plain layout as well."""
    if x.is_contiguous() or x.dim() not in (3, 4, 5):
        return False
    return x.movedim(1, -1).is_contiguous()


def use_channels_last(model: nn.Module) -> None:
    """Lay out the weights of all convolutions of `model` channels last, in place: torch's then return such tensors."""
    to_channels_last_1d(model)
    for module in model.modules():
        for kind, memory_format in _FORMATS.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=memory_format)


def to_channels_last_1d(x: Any) -> Any:
    """Tensor `x` ``[N, C, L]`` with strides of ``[N, L, C]``; of a module, the weights of its ``nn.Conv1d``, in place.

    Raises ValueError for a tensor of another rank.
    """
    if isinstance(x, nn.Module):
        for module in x.modules():
            if isinstance(module, nn.Conv1d):
                module.weight.data = to_channels_last_1d(module.weight.data)
        return x
    if x.dim() != 3:
        raise ValueError(f"x: expected [N, C, L], got {list(x.shape)}")
    _, channels, length = x.shape  # of which those that are 1 would leave strides that do not tell the layout
    return x.transpose(1, 2).contiguous().as_strided(x.shape, (channels * length, 1, channels))


def is_contiguous_channels_last_1d(x: torch.Tensor) -> bool:
    """Whether `x` ``[N, C, L]`` has the strides of ``[N, L, C]``."""
    return x.dim() == 3 and x.transpose(1, 2).is_contiguous()
