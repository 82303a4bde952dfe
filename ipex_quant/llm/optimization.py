"""`optimize`: quantize the linear layers of a transformers model and use native ops for the rest."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import PreTrainedModel

from ..checkpoints import open_checkpoint
from ..conversion.example import Example
from ..conversion.prepare import convert_some, prepare, prepare_with_summary
from ..conversion.qconfig import get_weight_only_quant_qconfig_mapping, needs_calibration
from ..conversion.swap import return_freed_memory
from ..errors import ArgumentError
from ..nn import QuantizedModule
from ..numerics.scheme import FLOAT_DTYPES, WoqWeightDtype
from .cache.layers import NativeLayer
from .casting import cast_float
from .convention import accept_tuples
from .native import use_native_stack
from .saved.checkpoint import apply_checkpoint
from .saved.hf_quantizer import attach
from .trace_graph import TraceGraph

logger = logging.getLogger("ipex_quant")


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
    kv_cache_dtype: torch.dtype | None = None,
) -> nn.Module | tuple[nn.Module, torch.optim.Optimizer | None]:
    """Quantize the linear layers of a transformers model of any architecture, and compute the rest natively in `dtype`.

    Attention, norms and KV caches become native in any model, whole decoder layers where their family is known;
    `generate` and `forward` are called as before, or by IPEX's convention (`accept_tuples`). Stock code runs in
    training mode, where gradients are needed (call the model under ``torch.inference_mode()``), and in layers in which
    a module is replaced or gets a hook.
    `ipex_quant.quantization.prepare` and the like restore stock layers first.

    - `dtype` is float32, bfloat16 or float16.
    - `quantization_config`, a mapping from ``ipex_quant.quantization``, says which layers to quantize and how;
      ``lm_head`` is included unless a rule for it is None. An output layer tied to a float embedding is untied first.
    - `qconfig_summary_file`, written by ``save_qconf_summary``, completes a static or SmoothQuant configuration.
      Without it nothing is quantized yet: pass the result to `prepare`, calibrate it, and save the summary.
    - `low_precision_checkpoint`, in any form that `open_checkpoint` takes, gives the quantized weights of the layers it
      holds; `quantization_config` then only selects the layers and their compute mode.
    - Without `inplace` the result is a copy and `model` is unchanged; with it, each float weight is freed as its layer
      is replaced.
    - `sample_inputs`, keyword (a dict) or positional (a tuple) arguments of `model`, are run once to find the layers
      that share an input, where activations are quantized; the default is transformers' dummy inputs.
    - With `deployment_mode` the result has a `trace_graph`, which is the model itself until it is saved: `TraceGraph`.
    - `cache_weight_for_large_batch` exists for IPEX's signature; nothing is cached.
    - `device` is "cpu", or "xpu" where torch finds one, to which the model is moved as transformers has it.
    - `kv_cache_dtype` is the dtype of stored keys and values: torch.int8 (one scale per token and head), a float dtype,
      or None for ``model.config.kv_cache_dtype``, or else the model's dtype.

    With ``model.config.token_latency = True``, `generate` returns (output, seconds per token).

    Raises ValueError for an unsupported `dtype`, `kv_cache_dtype` or configuration, for quantization of a model in
    training mode, a summary file of another model, NaN or Inf in a weight, and when quantization was asked for and no
    layer could be quantized (`ipex_quant.explain` tells more); OSError for a summary file that cannot be read;
    RuntimeError for another device, and for quantization on "xpu". Without quantization, a model in training mode or
    with an optimizer is returned unchanged as (model, optimizer), with a warning.
    """
    quantize = quantization_config is not None or low_precision_checkpoint is not None
    _check(model, dtype, device, quantize, cache_weight_for_large_batch)
    NativeLayer(kv_cache_dtype)  # raises for a bad dtype before anything changes
    static = needs_calibration(quantization_config)
    if qconfig_summary_file is not None and not static:
        raise ValueError("qconfig_summary_file: it goes with a static or SmoothQuant quantization_config")
    if model.training or optimizer is not None:
        if quantize:
            raise ValueError(
                "quantization is for inference: call model.eval() first"
                + (" and leave out the optimizer" if optimizer is not None else "")
            )
        warnings.warn("llm.optimize is for inference: a model in training mode is returned as it is", stacklevel=2)
        return model, optimizer
    if str(device) == "xpu":
        model = model if inplace else copy.deepcopy(model)
        cast_float(model, dtype)
        return model.to(device)
    if low_precision_checkpoint is not None:
        checkpoint = open_checkpoint(low_precision_checkpoint)
        mapping = quantization_config or get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
        model = apply_checkpoint(model, checkpoint, mapping, inplace)
    elif quantization_config is not None and (not static or qconfig_summary_file is not None):
        before = len(_quantized(model))
        model = convert_some(
            _prepare(model, quantization_config, qconfig_summary_file, sample_inputs, inplace), inplace=True
        )
        if len(_quantized(model)) == before:
            warnings.warn(f"nothing changed: {before} modules are quantized already and stay as they are", stacklevel=2)
    elif not inplace:
        model = copy.deepcopy(model)
    cast_float(model, dtype)
    if static and qconfig_summary_file is None:
        logger.info("ipex.llm.optimize is prepared for the calibration of the static quantization")
        accept_tuples(model)
        return_freed_memory()
        return attached(model)
    model = completed(model, kv_cache_dtype)
    if deployment_mode and isinstance(model, PreTrainedModel):
        model.trace_graph = TraceGraph(model)
    return model


def completed(model: nn.Module, kv_cache_dtype: torch.dtype | None) -> nn.Module:
    """`model`, whose layers are quantized as wanted, with all else native, and ready to be saved."""
    use_native_stack(model, kv_cache_dtype)
    accept_tuples(model)
    return_freed_memory()
    return attached(model)


def attached(model: nn.Module) -> nn.Module:
    """`model`, registered as quantized with transformers if it is one of its models and quantized."""
    if _quantized(model) and isinstance(model, PreTrainedModel):
        attach(model)
    return model


def _prepare(
    model: nn.Module, mapping: QConfigMapping, summary_file: str | None, sample_inputs: Any, inplace: bool
) -> nn.Module:
    def prepared(example: Example | None) -> nn.Module:
        if summary_file is not None:
            return prepare_with_summary(model, mapping, summary_file, example, inplace)
        args, kwargs = (None, None) if example is None else (example.args or None, example.kwargs or None)
        return prepare(model, mapping, args, inplace=inplace, example_kwarg_inputs=kwargs)

    if sample_inputs is not None:
        by_name = isinstance(sample_inputs, Mapping)
        return prepared(Example.of(model, None if by_name else sample_inputs, sample_inputs if by_name else None, True))
    try:
        return prepared(Example.of(model, None, model.dummy_inputs, True))
    except Exception as error:  # dummy inputs do not suit every model; each layer is then quantized alone
        logger.debug("no example to find share groups with: %r", error)
        return prepared(None)


def _quantized(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, QuantizedModule)]


def _check(model: nn.Module, dtype: torch.dtype, device: str, quantize: bool, cache_weights: bool) -> None:
    if not isinstance(model, nn.Module) or (quantize and isinstance(model, torch.jit.ScriptModule)):
        raise TypeError(f"model: expected a torch.nn.Module that is not scripted, got {type(model).__name__}")
    if str(device) not in ("cpu", "xpu"):
        raise RuntimeError(f"Device [{device}] is not supported in ipex_quant, options are [cpu, xpu]")
    if str(device) == "xpu" and not torch.xpu.is_available():
        raise RuntimeError("Device [xpu] is not available: torch finds none; leave device at cpu")
    if str(device) == "xpu" and quantize:
        raise RuntimeError("Device [xpu] has no quantized layers: leave the quantization out, or device at cpu")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if cache_weights and not quantize and dtype != torch.bfloat16:
        raise ArgumentError(f"cache_weight_for_large_batch is only valid for WOQ or BF16 cases, got {dtype}")
