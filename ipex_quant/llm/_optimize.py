"""`optimize`: quantize the linear layers of a transformers model and set the dtype of the rest."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import PreTrainedModel

from ..checkpoints import open_checkpoint
from ..nn import WeightOnlyQuantizedLinear
from ..nn.linears import FLOAT_DTYPES
from ..quantization import WoqWeightDtype, convert, get_weight_only_quant_qconfig_mapping, prepare
from ..quantization._swap import return_freed_memory
from ._casting import cast_float
from ._checkpoint import apply_checkpoint
from .hf_quantizer import attach


def optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype = torch.float,
    inplace: bool = False,
    device: str = "cpu",
    quantization_config: QConfigMapping | None = None,
    qconfig_summary_file: str | None = None,
    low_precision_checkpoint: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = True,
    cache_weight_for_large_batch: bool = False,
) -> nn.Module | tuple[nn.Module, torch.optim.Optimizer | None]:
    """Quantize the linear layers of a transformers model, of any architecture, and cast the rest to `dtype`.

    - `dtype` is float32, bfloat16 or float16.
    - `quantization_config`, of `get_weight_only_quant_qconfig_mapping`, says which layers and how; ``lm_head`` counts
      unless a rule of it says None. An output layer tied to the embedding is quantized on its own.
    - `low_precision_checkpoint` replaces the layers it holds by its quantized ones, in any form that `open_checkpoint`
      takes; `quantization_config` then only says which layers and what they compute in.
    - Without `inplace` the result is a copy and `model` is unchanged; with it, each float weight is freed as its layer
      is replaced.
    - `sample_inputs`, `deployment_mode` and `cache_weight_for_large_batch` are IPEX's; nothing is traced or cached.

    Raises ValueError for an unsupported `dtype` or configuration, a model in training mode, NaN or Inf in a weight, and
    when quantization was asked for and no layer could be quantized (`ipex_quant.explain` tells more); RuntimeError for
    another device. A model in training mode, or with an optimizer, comes back as it is in a tuple, with a warning, if
    no quantization was asked for.
    """
    quantize = quantization_config is not None or low_precision_checkpoint is not None
    _check(model, dtype, device, quantize, qconfig_summary_file, cache_weight_for_large_batch)
    if model.training or optimizer is not None:
        if quantize:
            raise ValueError(
                "quantization is for inference: call model.eval() first"
                + (" and leave out the optimizer" if optimizer is not None else "")
            )
        warnings.warn("llm.optimize is for inference: a model in training mode is returned as it is", stacklevel=2)
        return model, optimizer
    if low_precision_checkpoint is not None:
        checkpoint = open_checkpoint(low_precision_checkpoint)
        mapping = quantization_config or get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
        model = apply_checkpoint(model, checkpoint, mapping, inplace)
    elif quantization_config is not None:
        before = len(_quantized(model))
        model = convert(prepare(model, quantization_config, inplace=inplace), inplace=True)
        if len(_quantized(model)) == before:
            warnings.warn(f"nothing changed: {before} modules are quantized already and stay as they are", stacklevel=2)
    elif not inplace:
        model = copy.deepcopy(model)
    cast_float(model, dtype)
    return_freed_memory()
    quantized = _quantized(model)
    for module in quantized:
        module._cache_weight_for_large_batch |= cache_weight_for_large_batch
    if quantized and isinstance(model, PreTrainedModel):
        attach(model)
    return model


def _quantized(model: nn.Module) -> list[WeightOnlyQuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, WeightOnlyQuantizedLinear)]


def _check(
    model: nn.Module, dtype: torch.dtype, device: str, quantize: bool, summary_file: str | None, cache_weights: bool
) -> None:
    if not isinstance(model, nn.Module) or (quantize and isinstance(model, torch.jit.ScriptModule)):
        raise TypeError(f"model: expected a torch.nn.Module that is not scripted, got {type(model).__name__}")
    if str(device) == "xpu":
        raise RuntimeError("Device [xpu] is not available: ipex_quant runs on the cpu only")
    if str(device) != "cpu":
        raise RuntimeError(f"Device [{device}] is not supported in ipex_quant, options are [cpu]")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if summary_file is not None:
        raise ValueError("qconfig_summary_file: static quantization of activations is not supported yet")
    if cache_weights and not quantize:
        raise ValueError("cache_weight_for_large_batch is only valid with a weight-only quantization_config")
