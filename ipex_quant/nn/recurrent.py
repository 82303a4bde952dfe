"""Tells which modules are recurrent layers and cells, what their weights are, and which cannot be quantized."""

from __future__ import annotations

import torch
from torch import nn

from ..numerics.scheme import FLOAT_DTYPES

_CLASSES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def is_recurrent(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` or a cell of one in float, or a subclass of one."""
    return isinstance(module, _CLASSES)


def grouped_names(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of a recurrent module's weights, without ``weight_``; the weights of one tuple multiply the same tensor."""
    if isinstance(module, nn.RNNCellBase):
        return [("ih",), ("hh",)]
    ends = ("", "_reverse")[: 1 + module.bidirectional]
    parts = ("hh", "hr") if module.proj_size else ("hh",)
    names = []
    for layer in range(module.num_layers):
        names.append(tuple(f"ih_l{layer}{end}" for end in ends))
        names += [(f"{part}_l{layer}{end}",) for end in ends for part in parts]
    return names


def recurrent_obstacle(module: nn.Module) -> str | None:
    """Reason, other than its weights, why the recurrent `module` cannot be replaced by a quantized one, or None."""
    base = next(cls for cls in _CLASSES if isinstance(module, cls))
    if type(module).forward is not base.forward:
        return f"{type(module).__name__} overrides {base.__name__}.forward"
    return None


def recurrent_weight_obstacle(module: nn.Module) -> str | None:
    """Reason why the weights of the recurrent `module` cannot be quantized, or None."""
    for name in (name for names in grouped_names(module) for name in names):
        weight = module._parameters.get(f"weight_{name}")
        if weight is None:
            return f"its weight_{name} is computed from other parameters"
        if weight.dtype not in FLOAT_DTYPES:
            return f"its weight_{name} is {weight.dtype}, not float32, bfloat16 or float16"
        if weight.device.type != "cpu":
            return f"its weight_{name} is on device {weight.device}, not cpu"
        if weight.numel() == 0:
            return f"its weight_{name} is empty"
    return None


def named_biases(module: nn.Module) -> dict[str, torch.Tensor]:
    """The biases of a recurrent layer or cell, by their names without ``bias_``."""
    biases = {name.removeprefix("bias_"): p for name, p in module._parameters.items() if name.startswith("bias_")}
    return {name: bias for name, bias in biases.items() if bias is not None}
