"""The description of quantized modules in a transformers model's configuration, for saving and loading."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from ..nn import (
    Int8Conv,
    Int8Linear,
    Int8Recurrent,
    Int8RecurrentCell,
    QuantizedEmbedding,
    QuantizedModule,
    WeightOnlyQuantizedExpertLinears,
    WeightOnlyQuantizedExperts,
    WeightOnlyQuantizedLinear,
)

METHOD = "ipex_quant"
VERSION = 1
"""Version of the description and of the tensors that it describes."""

KINDS: dict[str, type[QuantizedModule]] = {
    module.kind: module
    for module in (
        WeightOnlyQuantizedLinear,
        Int8Linear,
        Int8Conv,
        Int8Recurrent,
        Int8RecurrentCell,
        WeightOnlyQuantizedExperts,
        WeightOnlyQuantizedExpertLinears,
        QuantizedEmbedding,
    )
}
"""Classes of quantized modules by their names in saved configurations."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a transformers model."""
    # If transformers was not imported, no instance of its class exists; importing it here is slow.
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def describe(model: nn.Module) -> dict[str, Any]:
    """The entry `quantization_config` that describes the quantized modules of `model`."""
    modules = {
        name: {"kind": module.kind, **module.describe()}
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
    }
    dtype = str(main_dtype(model)).removeprefix("torch.")
    shared = {"share_groups": share_groups(model), "tied": tied_groups(model)}
    return {"quant_method": METHOD, "version": VERSION, "dtype": dtype, "modules": modules, **shared}


def note_method(model: nn.Module) -> None:
    """Write the description of a transformers model to its configuration, and set its quantizer if registered."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

    model.config.quantization_config = describe(model)
    if METHOD in AUTO_QUANTIZER_MAPPING:
        model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)


def share_groups(model: nn.Module) -> list[list[str]]:
    """Groups of names of INT8 linears that have one packed weight, in its order; groups of one are left out."""
    groups = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            groups[id(module.share_group)][module.member] = name
    return [[members[i] for i in sorted(members)] for members in groups.values() if len(members) > 1]


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Groups of names of embeddings, and last a linear layer, that hold one packed weight; the first one saves it."""
    groups = defaultdict(list)
    for kind in (QuantizedEmbedding, WeightOnlyQuantizedLinear):
        for name, module in model.named_modules():
            if isinstance(module, kind):
                groups[id(getattr(module, "table", module))].append(name)
    return [group for group in groups.values() if len(group) > 1]


def main_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of most float parameters of `model`, by number of elements; float32 when it has none."""
    counts = Counter({torch.float32: 0})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return max(counts, key=counts.__getitem__)
