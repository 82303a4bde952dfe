"""What a transformers model's configuration says about its quantized modules, for saving and loading it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..nn import WeightOnlyQuantizedLinear

METHOD = "ipex_quant"
VERSION = 1
"""Version of the entry and of the tensors it describes."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a transformers model."""
    # Without transformers imported no instance of its class can exist, so there is no need to import it here.
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def describe(model: nn.Module) -> dict[str, Any]:
    """The entry `quantization_config` for the quantized modules of `model`, as they are now."""
    modules = {
        name: _entry(module) for name, module in model.named_modules() if isinstance(module, WeightOnlyQuantizedLinear)
    }
    dtype = str(main_dtype(model)).removeprefix("torch.")
    return {"quant_method": METHOD, "version": VERSION, "dtype": dtype, "modules": modules}


def main_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of most float parameters of `model`, by number of elements; float32 when it has none."""
    counts = Counter({torch.float32: 0})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return max(counts, key=counts.__getitem__)


def _entry(module: WeightOnlyQuantizedLinear) -> dict[str, Any]:
    return {
        "weight_dtype": module.dtype.name.lower(),
        "symmetric": module.scheme.symmetric,
        "group_size": module.scheme.group_size,
        "act_order": module._perm is not None,
        "bias": module._bias is not None,
        "lowp_mode": module._lowp_mode.name.lower(),
        "act_quant_mode": module._act_quant_mode.name.lower(),
    }
