"""Casting the float parameters of a quantized model to the dtype that it computes in."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..conversion.description import main_dtype
from ..nn import QuantizedModule


def cast_float(model: nn.Module, dtype: torch.dtype, main: torch.dtype | None = None) -> None:
    """Cast the float parameters and saved buffers of `model` to `dtype`, in place.

    As when transformers loads a model in `dtype`, some tensors keep their dtype: parameters whose dtype is not `main`
    (by default the dtype of most parameters), parameters that the model's class keeps in float32, and buffers that are
    not saved, such as rotary frequencies. Tables of sinusoidal position embeddings are cast although not saved.
    """
    exceptions = _kept_in_float32(model, dtype)
    main = main_dtype(model) if main is None else main
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            module.to(dtype)
            continue
        added = hasattr(module, "make_weights")  # a sinusoidal position embedding of transformers
        saved = {key for key in module._buffers if added or key not in module._non_persistent_buffers_set}
        for key, tensor in (*module._parameters.items(), *((key, module._buffers[key]) for key in saved)):
            path = f"{name}.{key}" if name else key
            if tensor is not None and tensor.dtype == main and not (exceptions and exceptions.search(path)):
                tensor.data = tensor.data.to(dtype)


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Pattern of the parameters that transformers classes keep in float32 when a model is cast to `dtype`.

    Classes declare `_strict` names for bfloat16 and float16, and others for float16 only.
    """
    names = set()
    for module in model.modules():
        if dtype != torch.float32:
            names.update(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None
