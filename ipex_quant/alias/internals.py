"""Functions that IPEX kept to itself and scripts call all the same."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..frontend.prepacking import prepack_lstms


def choose_no_kernels() -> None:
    """Do nothing: IPEX's switches between oneDNN's and libxsmm's kernels have no counterpart here."""


_enable_tpp = _disable_tpp = _enable_dnnl = _disable_dnnl = choose_no_kernels


def enable_weight_cache(qconfig: Any) -> Any:
    """`qconfig` itself: prompts are multiplied with the packed weight, of which no second copy is kept."""
    return qconfig


def replace_lstm_with_ipex_lstm(model: nn.Module, optimizer: object = None) -> None:
    """Prepack every ``nn.LSTM`` inside `model`, in place, as `ipex_quant.optimize` does."""
    prepack_lstms(model)
