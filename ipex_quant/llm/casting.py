"""Casting what stays in float to the dtype a model computes in."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..conversion.description import main_dtype
from ..nn import QuantizedModule


def cast_float(model: nn.Module, dtype: torch.dtype, main: torch.dtype | None = None) -> None:
    """Cast the float parameters and saved buffers of `model` to `dtype`, in place.

    As when transformers loads a model in `dtype`, three things keep their precision: parameters whose dtype is not the
    `main` one, by default that of most of the model; those that the model's class keeps in float32; and buffers that
    are not saved, such as rotary frequencies, unless they are tables that are added to embeddings.
    """
    exceptions = _kept_in_float32(model, dtype)
    main = main_dtype(model) if main is None else main
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            module.to(dtype)
            continue
        added = hasattr(module, "make_weights")  # as transformers' sinusoidal embeddings have it
        saved = {key for key in module._buffers if added or key not in module._non_persistent_buffers_set}
        for key, tensor in (*module._parameters.items(), *((key, module._buffers[key]) for key in saved)):
            path = f"{name}.{key}" if name else key
            if tensor is not None and tensor.dtype == main and not (exceptions and exceptions.search(path)):
                tensor.data = tensor.data.to(dtype)


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Patterns that transformers classes declare: `_strict` ones for any narrow dtype, the others for float16."""
    names = set()
    for module in model.modules():
        if dtype != torch.float32:
            names.update(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None
