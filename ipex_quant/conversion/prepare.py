"""`prepare` and `convert`: from a float model to one with quantized layers."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping

from ..errors import ArgumentTypeError, OrderError
from ..nn import (
    QuantizedEmbedding,
    QuantizedModule,
    WeightOnlyQuantizedExpertLinears,
    WeightOnlyQuantizedExperts,
    WeightOnlyQuantizedLinear,
)
from ..nn.embeddings import is_embedding
from ..nn.expert_linears import holds_expert_linears
from ..nn.fused_forward import restore_forwards
from ..nn.linears import holds_experts, is_linear
from ..nn.multihead_attention import join_attentions, split_attentions
from ..nn.norms import is_norm
from ..nn.recurrent import is_recurrent
from ..numerics.scheme import QConfigWoq
from ..smoothquant.tracing import SharedInput, trace_groups
from .description import is_pretrained, note_method
from .errors import naming
from .example import Example, ExampleError
from .int8 import int8_replacements, recurrent_replacements
from .observed import ATTRIBUTE, Observed, make_groups, observed
from .qconfig import QConfigSmoothQuant, QuantizationKind, kind_of
from .resizing import watch_head
from .rules import choose_qconfigs, computes_otherwise, fit_reasons, refused_modules
from .summary import load_qconf_summary, read_summary, save_qconf_summary, summary_groups
from .swap import copy_on_write, swap_modules
from .tidy import drop_dropout, fold_batch_norms, leave_fast_paths
from .tying import share_tables, tied_modules, untie

FLOAT_REASONS = "_ipex_quant_float_reasons"
"""Attribute of a prepared or converted model: ``{layer name: reason why it stays in float}``."""

_PREPARED = "q_config"
_SUMMARY_METHODS = {"save_qconf_summary": save_qconf_summary, "load_qconf_summary": load_qconf_summary}


def prepare(
    model: nn.Module,
    configure: QConfigMapping | QConfig | QConfigSmoothQuant | QConfigWoq,
    example_inputs: Any = None,
    inplace: bool = False,
    bn_folding: bool = True,
    example_kwarg_inputs: dict[str, Any] | None = None,
) -> nn.Module:
    """Mark the layers of `model` that `configure` quantizes, and observe their inputs where calibration needs them.

    All rules of the mapping apply, by torch's precedence (module name, regex, type, global); None leaves a module in
    float. All configurations quantize linear layers; weight-only and dynamic ones also the experts of transformers
    models, static and SmoothQuant ones convolutions, and dynamic ones LSTMs, GRUs, RNNs and their cells. An
    ``nn.MultiheadAttention`` is split into layers `q_proj`, `k_proj`, `v_proj` and `out_proj`, which rules may name;
    its state dict stays the same. An embedding is quantized if a weight-only rule has its own name or its type;
    ``set_object_type(nn.Embedding, ...)`` applies to subclasses, but not to tables with less than half as many rows as
    the largest one, such as position embeddings.

    Static and SmoothQuant configurations need an example, `example_inputs` (a tensor or a tuple of positional
    arguments) or `example_kwarg_inputs`. `model` is run on it once, to find the layers of one parent that consume the
    same tensor, which will share its quantization. Then calibrate the result: run batches through it, or call
    `calibrate`. Dynamic configurations may have an example for the same purpose, and go without, with a warning, if the
    model cannot be called with it; weight-only ones ignore it. If activations are quantized, dropout becomes identity,
    and with `bn_folding` a BatchNorm is folded into the layer whose output only it reads; the model keeps its class.
    The result has the methods `save_qconf_summary` and `load_qconf_summary`.

    Without `inplace` the result is a copy, whose parameters share the memory of `model` until one of the two is
    written to. Raises TypeError for another kind of model or configuration, and ValueError if an example is missing, if
    both are given, or if it is needed and the model cannot be called with it.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"Only support nn.Module prepare for quantization path, got {type(model).__name__}")
    if isinstance(configure, (QConfig, QConfigSmoothQuant, QConfigWoq)):
        warnings.warn("QConfig are deprecated. Please use QConfigMapping instead", DeprecationWarning, stacklevel=2)
        configure = QConfigMapping().set_global(configure)
    if not isinstance(configure, QConfigMapping):
        raise ArgumentTypeError(
            "IPEX quantization: prepare configure should be an instance of QConfigMapping or QConfig, "
            f"but got {type(configure)}"
        )
    chosen, reasons = choose_qconfigs(configure, model)
    kinds = {kind_of(qconfig) for qconfig in chosen.values()}
    example, needed = None, any(kind.needs_calibration for kind in kinds)
    if kinds - {QuantizationKind.WEIGHT_ONLY}:
        example = Example.of(model, example_inputs, example_kwarg_inputs, needed)
    model = mark(model, configure, chosen, reasons, inplace)
    if kinds - {QuantizationKind.WEIGHT_ONLY}:
        activations = _to_observe(model, chosen)
        try:
            drop_dropout(model)
            _fold_and_observe(model, activations, example, bn_folding, needed)
        except Exception:
            _forget(model)  # half prepared, it must not look prepared
            join_attentions(model)
            raise
    return model


def _fold_and_observe(
    model: nn.Module, activations: dict[str, Any], example: Example | None, bn_folding: bool, needed: bool
) -> None:
    """Fold BatchNorms and attach observers; without the `example`, with a warning, if it fails and is not `needed`."""
    try:
        if example is not None and bn_folding:
            fold_batch_norms(model, activations, example)
        observe(model, activations, example)
    except ExampleError as error:
        if needed:
            raise
        warnings.warn(
            f"dynamic quantization goes without the example, and layers quantize a common input one by one: {error}",
            stacklevel=3,
        )
        observe(model, activations, None)


def mark(
    model: nn.Module, mapping: QConfigMapping, chosen: dict[str, Any], reasons: dict[str, str], inplace: bool
) -> nn.Module:
    """Mark the layers of `model`, or without `inplace` of a copy, with the results of `choose_qconfigs`.

    Removes the marks of an earlier `prepare`.
    """
    model = model if inplace else copy_on_write(model)
    _forget(model)
    restore_forwards(model)
    model = split_attentions(model, chosen)
    reasons = fit_reasons(reasons, model)
    for name in (*chosen, *reasons):
        model.get_submodule(name).qconfig = chosen.get(name)
    leave_fast_paths(model, chosen)
    setattr(model, _PREPARED, mapping)
    setattr(model, FLOAT_REASONS, reasons)
    return model


def prepare_with_summary(
    model: nn.Module, mapping: QConfigMapping, path: str | os.PathLike, example: Example | None, inplace: bool
) -> nn.Module:
    """`prepare`, with parameters from the qconf summary at `path`; without `example` also with its share groups.

    Raises OSError and ValueError as `load_qconf_summary` does.
    """
    chosen, reasons = choose_qconfigs(mapping, model)
    groups = summary_groups(read_summary(path), chosen.keys())
    model = mark(model, mapping, chosen, reasons, inplace)
    drop_dropout(model)
    observe(model, _to_observe(model, chosen), example, groups)
    load_qconf_summary(model, path)
    return model


def _to_observe(model: nn.Module, chosen: dict[str, Any]) -> dict[str, Any]:
    """The layers of `chosen` whose inputs are observed: not weight-only ones, nor recurrent ones (always dynamic)."""
    return {
        name: qconfig
        for name, qconfig in chosen.items()
        if not (isinstance(qconfig, QConfigWoq) or is_recurrent(model.get_submodule(name)))
    }


def observe(
    model: nn.Module, qconfigs: dict[str, Any], example: Example | None, groups: Sequence[SharedInput] = ()
) -> None:
    """Attach observers to the layers in `qconfigs`, in share groups traced with `example`, or else in `groups`."""
    if example is not None:
        norms = {name for name, module in model.named_modules() if is_norm(module)}
        groups = trace_groups(model, qconfigs.keys(), norms, partial(example.run, model))
    Observed(make_groups(groups, qconfigs, model)).attach(model)
    for name, method in _SUMMARY_METHODS.items():
        setattr(model, name, partial(method, model))


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace the layers that `prepare` marked by quantized ones, one at a time.

    With `inplace` each float weight is freed as its layer is replaced, unless something else refers to it. Without, the
    result is a copy and `model` is unchanged. If `model` is itself a layer to quantize, its replacement is returned.

    Activations are quantized with the parameters from calibration, or from a loaded summary; a layer that calibration
    never reached stays in float, with a warning. SmoothQuant's factors are folded into the norm before a layer if
    nothing else reads its output, else into the quantization of the activation. No weight is quantized at run time.

    The configuration of a transformers model gets the entry that `from_pretrained` and `ipex_quant.llm.load` need;
    `ipex_quant.llm.save` writes it again if the model has changed. If `ipex_quant.llm` was imported, the model's
    `dequantize` works. Quantized weights are untied from float ones; embeddings and an output layer whose common weight
    was quantized alike share one packed weight.

    Warns of layers that stay in float for another reason than the mapping, and gives the reasons if all layers do; the
    model is then as before `prepare`. Raises TypeError for another kind of model, RuntimeError for one that was not
    prepared or not calibrated, and ValueError, naming the module, for NaN or Inf in a weight.
    """
    return _convert(model, inplace, _warn_of_nothing)


def convert_some(model: nn.Module, inplace: bool = False) -> nn.Module:
    """`convert`, with a ValueError when no layer is or can be quantized."""
    return _convert(model, inplace, check_any_quantized)


def _convert(model: nn.Module, inplace: bool, check: Callable[[nn.Module], None]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"Only support nn.Module convert for quantization path, got {type(model).__name__}")
    if not hasattr(model, _PREPARED):
        raise OrderError("Please do prepare the model before doing convert")
    if hasattr(model, ATTRIBUTE):
        check_calibrated(observed(model))
    model = model if inplace else copy_on_write(model)
    replacements = _replacements(model)
    _forget(model)
    if not replacements:
        check(model)
    ties = tied_modules(model, marked_modules(model))
    untie(model, replacements)
    model = swap_modules(model, replacements)
    share_tables(model, ties)
    model = join_attentions(model)
    reasons = fit_reasons(getattr(model, FLOAT_REASONS, {}), model)
    setattr(model, FLOAT_REASONS, reasons)
    is_quantized = any(isinstance(module, QuantizedModule) for module in model.modules())
    if is_quantized:
        warn_of_float(model, reasons)
    for module in model.modules():
        if hasattr(module, "qconfig"):
            del module.qconfig
    if is_quantized and is_pretrained(model):
        note_method(model)
        watch_head(model)
    return model


def check_calibrated(observations: Observed) -> None:
    """Raise RuntimeError if calibration has reached none of the layers that need it."""
    waiting = [group for group in observations.static_groups if any(layer.quantized for layer in group.layers)]
    if waiting and not any(group.has_data for group in waiting):
        names = [layer.name or "the model" for group in waiting for layer in group.layers]
        more = f", ... ({len(names)} layers)" if len(names) > 8 else ""
        raise RuntimeError(
            f"convert: not calibrated: {', '.join(names[:8])}{more} have seen no data; first run batches through the "
            "prepared model, or call its load_qconf_summary"
        )


def _replacements(model: nn.Module) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """For each layer to quantize, by name, a function that makes its quantized module; notes reasons for the others."""
    replacements = {name: partial(_from_float, name) for name in marked_modules(model)} | recurrent_replacements(model)
    if hasattr(model, ATTRIBUTE):
        found, reasons = int8_replacements(model, observed(model))
        replacements |= found
        setattr(model, FLOAT_REASONS, getattr(model, FLOAT_REASONS) | reasons)
    return replacements


def _forget(model: nn.Module) -> None:
    """Remove the attributes and hooks that `prepare` attached to `model`, except for the reasons."""
    if hasattr(model, ATTRIBUTE):
        observed(model).detach(model)
    for name in (_PREPARED, *_SUMMARY_METHODS):
        vars(model).pop(name, None)


def marked_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers, the embeddings and the experts that `prepare` marked."""
    return [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or is_embedding(module) or holds_experts(module))
        and isinstance(getattr(module, "qconfig", None), QConfigWoq)
    ]


def check_any_quantized(model: nn.Module) -> None:
    """Raise ValueError, with the first few reasons, when no layer of a prepared or converted model is quantized."""
    if reason := _why_nothing(model):
        raise ValueError(reason)


def _warn_of_nothing(model: nn.Module) -> None:
    if reason := _why_nothing(model):
        warnings.warn(f"convert: the model stays in float: {reason}", stacklevel=4)


def _why_nothing(model: nn.Module) -> str | None:
    """Why no layer of a prepared or converted model is quantized; None where one is."""
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        return None
    reasons = getattr(model, FLOAT_REASONS)
    if not reasons:
        return f"nothing to quantize: {type(model).__name__} has no linear layer"
    shown = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(reasons.items())[:5])
    more = "; ..." if len(reasons) > 5 else ""
    return f"none of the {len(reasons)} linear layers can be quantized: {shown}{more}"


def warn_of_float(model: nn.Module, reasons: dict[str, str]) -> None:
    """Warn of the layers in `reasons` that no rule leaves in float; only of their number if they hold most weights.

    Small layers with a forward of their own, such as routers, are left out.
    """
    refused = refused_modules(reasons)
    parameters = {p for name in refused for p in model.get_submodule(name).parameters()}
    in_float = sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
    quantized = (module for module in model.modules() if isinstance(module, QuantizedModule))
    if in_float > sum(math.prod(module.weight_shape) for module in quantized):
        experts = sum(holds_experts(model.get_submodule(name)) for name in refused)
        recurrent = sum(is_recurrent(model.get_submodule(name)) for name in refused)
        tables = sum(is_embedding(model.get_submodule(name)) for name in refused)
        linear = len(refused) - experts - recurrent - tables
        kinds = [f"{linear} linear layers"] * bool(linear) + [f"{recurrent} recurrent layers"] * bool(recurrent)
        kinds += [f"{tables} embeddings"] * bool(tables)
        kinds += [f"the experts in 3-D parameters of {experts} modules"] * bool(experts)
        warnings.warn(
            f"most weights stay in float: {' and '.join(kinds)} cannot be quantized; ipex.explain(model) says why",
            stacklevel=4,
        )
        return
    told = [f"{name}: {reasons[name]}" for name in refused if not computes_otherwise(reasons[name])]
    if told:
        more = "; ..." if len(told) > 8 else ""
        warnings.warn(f"{len(told)} layers stay in float: {'; '.join(told[:8])}{more}", stacklevel=4)


def _from_float(name: str, module: nn.Module) -> nn.Module:
    if is_linear(module):
        kind = WeightOnlyQuantizedLinear
    elif is_embedding(module):
        kind = QuantizedEmbedding
    else:
        kind = WeightOnlyQuantizedExpertLinears if holds_expert_linears(module) else WeightOnlyQuantizedExperts
    with naming(name):
        return kind.from_float(module)
