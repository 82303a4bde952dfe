"""`prepare` and `convert`: from a float model to one with quantized linear layers."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping

from ..nn import WeightOnlyQuantizedLinear
from ..nn.linears import holds_experts, is_linear
from ._description import describe, is_pretrained
from ._qconfig import QConfigWoq
from ._rules import choose_qconfigs, refused_modules
from ._swap import copy_sharing_parameters, own_parameters, swap_modules
from ._tying import untie

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
    result is a copy and `model` stays as it is, so that no more than both exist. The result shares no memory with the
    model that `prepare` copied: what stays in float is copied now. A `model` that is itself a linear layer is not
    changed but its replacement returned.

    The configuration of a transformers model gets the entry that `from_pretrained` and `ipex_quant.llm.load` need;
    should the model change after that, `ipex_quant.llm.save` describes it anew. Quantized weights are untied from
    others. Warns when most weights stay in float for another reason than the mapping. Raises TypeError for another kind
    of model, RuntimeError for one that was not prepared, ValueError when no layer is or can be quantized, saying why,
    and when a weight holds NaN or Inf, naming the module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Only support nn.Module convert for quantization path, got {type(model).__name__}")
    if not hasattr(model, _PREPARED):
        raise RuntimeError("Please do prepare the model before doing convert")
    marked = marked_modules(model)
    if not marked:
        check_any_quantized(model)
    model = model if inplace else copy_sharing_parameters(model)
    untie(model, marked)
    model = swap_modules(model, {name: partial(_from_float, name) for name in marked})
    own_parameters(model)
    warn_if_mostly_float(model, refused_modules(getattr(model, FLOAT_REASONS, {})))
    for module in model.modules():
        if hasattr(module, "qconfig"):
            del module.qconfig
    if hasattr(model, _PREPARED):
        delattr(model, _PREPARED)
    if is_pretrained(model):
        model.config.quantization_config = describe(model)
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


def warn_if_mostly_float(model: nn.Module, refused: list[str]) -> None:
    """Warn when the `refused` linear layers and the experts of `model` outweigh what is quantized."""
    experts = [name for name, module in model.named_modules() if holds_experts(module)]
    parameters = (p for name in (*refused, *experts) for p in model.get_submodule(name).parameters())
    in_float = sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
    quantized = (module for module in model.modules() if isinstance(module, WeightOnlyQuantizedLinear))
    if in_float > sum(module.in_features * module.out_features for module in quantized):
        kinds = [f"{len(refused)} linear layers"] * bool(refused)
        kinds += [f"the experts in 3-D parameters of {len(experts)} modules"] * bool(experts)
        warnings.warn(
            f"most weights stay in float: {' and '.join(kinds)} cannot be quantized; ipex.explain(model) says why",
            stacklevel=3,
        )


def _from_float(name: str, module: nn.Module) -> nn.Module:
    try:
        return WeightOnlyQuantizedLinear.from_float(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error
