"""Which layers of a model are prepacked, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn.prepacked import PrepackedLinear, compute_dtype, prepack
from ..nn.prepacked_conv import PrepackedConv, PrepackedConvTranspose
from ..nn.prepacked_lstm import PrepackedLSTM
from ..numerics.scheme import FLOAT_DTYPES

FORWARDS: dict[type[nn.Module], Any] = {
    nn.Linear: PrepackedLinear,
    nn.Conv1d: PrepackedConv,
    nn.Conv2d: PrepackedConv,
    nn.Conv3d: PrepackedConv,
    nn.ConvTranspose2d: PrepackedConvTranspose,
    nn.ConvTranspose3d: PrepackedConvTranspose,
}
"""The forwards of layers of these classes, not of their subclasses, which may compute otherwise."""


def prepack_weights(model: nn.Module) -> None:
    """Prepack every layer of `model` that oneDNN computes, except LSTMs, in place."""
    for module in model.modules():
        forward = FORWARDS.get(type(module))
        if forward is not None and forward.suits(module) and _is_plain(module, "weight"):
            prepack(forward(module))


def prepack_for_training(model: nn.Module, dtype: torch.dtype) -> None:
    """Prepack as `prepack_weights` does where this CPU multiplies in another dtype than `dtype`, for that dtype.

    Weights that change with every step are not worth packing.
    """
    if compute_dtype(dtype) != dtype:
        prepack_weights(model)


def prepack_lstms(model: nn.Module) -> None:
    """Prepack every ``nn.LSTM`` of `model`, in place."""
    for module in model.modules():
        if type(module) is nn.LSTM and _is_plain(module, *module._flat_weights_names):
            prepack(PrepackedLSTM(module))


def _is_plain(module: nn.Module, *names: str) -> bool:
    """Whether the named weights of `module` are parameters that oneDNN takes, and its forward is its own."""
    if not torch.backends.mkldnn.is_available() or "forward" in vars(module):
        return False
    weights = [module._parameters.get(name) for name in names]  # None if computed, as by `weight_norm`
    return all(w is not None and w.device.type == "cpu" and w.dtype in FLOAT_DTYPES for w in weights)
