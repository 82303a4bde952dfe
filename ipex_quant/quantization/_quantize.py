"""`prepare` and `convert`: from a float model to one with quantized linear layers."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping

from ..nn import WeightOnlyQuantizedLinear
from ..nn.linears import is_linear
from ._qconfig import QConfigWoq
from ._rules import choose_qconfigs
from ._swap import copy_sharing_parameters, swap_modules

FLOAT_REASONS = "_ipex_quant_float_reasons"
"""Attribute of a prepared or converted model: ``{module name: why it stays in float}`` of its linear layers."""

_PREPARED = "q_config"


def prepare(
    model: nn.Module,
    configure: QConfigMapping | QConfig | QConfigWoq,
    example_inputs: Any = None,
    inplace: bool = False,
    bn_folding: bool = True,
    example_kwarg_inputs: dict[str, Any] | None = None,
) -> nn.Module:
    """Mark the linear layers of `model` that `configure` quantizes, for `convert` to replace.

    Every rule of the mapping counts, by torch's precedence (module name, regex, type, global); None leaves a module in
    float. Weight-only quantization needs no examples and traces nothing, so `example_inputs`, `bn_folding` and
    `example_kwarg_inputs` have no effect on it. Without `inplace` a copy is marked that shares the parameters' memory
    with `model`. Raises TypeError for another kind of model or configuration, ValueError for one that is not
    weight-only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Only support nn.Module prepare for quantization path, got {type(model).__name__}")
    if isinstance(configure, (QConfig, QConfigWoq)):
        warnings.warn("QConfig are deprecated. Please use QConfigMapping instead", DeprecationWarning, stacklevel=2)
        configure = QConfigMapping().set_global(configure)
    if not isinstance(configure, QConfigMapping):
        raise TypeError(
            "IPEX quantization: prepare configure should be an instance of QConfigMapping or QConfig, "
            f"but got {type(configure)}"
        )
    chosen, reasons = choose_qconfigs(configure, model)
    model = model if inplace else copy_sharing_parameters(model)
    for name in (*chosen, *reasons):
        model.get_submodule(name).qconfig = chosen.get(name)
    setattr(model, _PREPARED, configure)
    setattr(model, FLOAT_REASONS, reasons)
    return model


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace the linear layers that `prepare` marked by quantized ones, one at a time.

    With `inplace` each float weight is freed as its layer is replaced, unless something else refers to it; without, the
    result is a copy and `model` stays as it is, so that no more than both exist. A `model` that is itself a linear
    layer is not changed but its replacement returned. Raises TypeError for another kind of model, RuntimeError for one
    that was not prepared, ValueError when no layer is or can be quantized, saying why, and when a weight holds NaN or
    Inf, naming the module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Only support nn.Module convert for quantization path, got {type(model).__name__}")
    if not hasattr(model, _PREPARED):
        raise RuntimeError("Please do prepare the model before doing convert")
    marked = marked_modules(model)
    if not marked:
        check_any_quantized(model)
    model = swap_modules(model, {name: partial(_from_float, name) for name in marked}, inplace)
    for module in model.modules():
        if hasattr(module, "qconfig"):
            del module.qconfig
    if hasattr(model, _PREPARED):
        delattr(model, _PREPARED)
    return model


def marked_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers that `prepare` marked."""
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and isinstance(getattr(module, "qconfig", None), QConfigWoq)
    ]


def check_any_quantized(model: nn.Module) -> None:
    """Raise ValueError, with the first few reasons, when no layer of a prepared or converted model is quantized."""
    if any(isinstance(module, WeightOnlyQuantizedLinear) for module in model.modules()):
        return
    reasons = getattr(model, FLOAT_REASONS)
    if not reasons:
        raise ValueError(f"nothing to quantize: {type(model).__name__} has no linear layer")
    shown = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(reasons.items())[:5])
    more = "; ..." if len(reasons) > 5 else ""
    raise ValueError(f"none of the {len(reasons)} linear layers can be quantized: {shown}{more}")


def _from_float(name: str, module: nn.Module) -> nn.Module:
    try:
        return WeightOnlyQuantizedLinear.from_float(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error
