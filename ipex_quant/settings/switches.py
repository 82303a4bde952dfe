"""Switches of the process."""

from __future__ import annotations

import logging

import torch

from ..nn.memory_format import set_auto_channels_last


def enable_onednn_fusion(enabled: bool = True) -> None:
    """Let TorchScript run oneDNN's fused graphs, or no longer: `torch.jit.enable_onednn_fusion`.

    It counts for what is traced or scripted, and frozen, and first run afterwards. Off by default, as in torch: modules
    of this package, and those that `optimize` prepacks, are fused in eager too.
    """
    torch.jit.enable_onednn_fusion(enabled)


def enable_auto_channels_last() -> None:
    """Let `optimize` lay out the weights of convolutions channels last, as it does by default.

    INT8 convolutions made from now on return channels last, too, which by default they do if their input or float
    weight is: it saves a copy, but code that takes a `view` of the result would fail.
    """
    set_auto_channels_last(True)


def disable_auto_channels_last() -> None:
    """Let `optimize` leave the memory layout of convolutions' weights as it is."""
    set_auto_channels_last(False)


def set_logging_level(level: int | str = logging.WARNING) -> None:
    """Set the least level of the messages of this package's logger, "ipex_quant"; ValueError for an unknown name."""
    logging.getLogger("ipex_quant").setLevel(level)
