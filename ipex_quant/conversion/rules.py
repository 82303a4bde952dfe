"""`choose_qconfigs`: which layers of a model a torch `QConfigMapping` quantizes, and why others stay in float."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn
from torch.ao.quantization import QConfigMapping

from ..nn.embeddings import embedding_obstacle, is_embedding
from ..nn.expert_linears import holds_expert_linears
from ..nn.linears import (
    conv_obstacle,
    holds_experts,
    is_convolution,
    is_linear,
    obstacle,
    weight_matrix,
    weight_obstacle,
)
from ..nn.multihead_attention import READ_BY_ATTENTION, attention_obstacle, is_split_attention, named_layers
from ..nn.recurrent import is_recurrent, recurrent_obstacle, recurrent_weight_obstacle
from ..nn.stacked_experts import experts_obstacle, experts_weight_obstacle
from ..numerics.scheme import QConfigWoq
from .qconfig import QuantizationKind, dynamic_experts_qconfig, kind_of

_BY_RULE = "the mapping's "
BY_SUMMARY = "the qconf summary leaves it in float"
NEVER_REACHED = "calibration never reached it"


def choose_qconfigs(
    mapping: QConfigMapping, model: nn.Module, read_weights: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Configurations of the layers of `model` to quantize, and reasons why the others stay in float, both by name.

    Layers are linear layers, modules of experts, convolutions for static quantization, recurrent layers for dynamic
    quantization, and embeddings if a rule has their own name or their type. The projections of an
    ``nn.MultiheadAttention`` count as the linear layers that `split_attentions` makes of them. Without `read_weights`
    the values of the weights are not checked. Raises TypeError for a configuration of an unknown kind.
    """
    _check_rules(mapping, model)
    chosen, reasons = _choose_embeddings(mapping, model, read_weights)
    layers = dict(named_layers(model))
    for name, module in layers.items():
        kinds = is_linear(module), is_convolution(module), is_recurrent(module), holds_experts(module)
        if not any(kinds) and attention_obstacle(module) is None:
            continue
        path = name.split(".") if name else []
        lineage = [layers[".".join(path[:end])] for end in range(len(path), -1, -1)]
        qconfig, rule = _find_qconfig(mapping, name, lineage)
        try:
            kind = None if qconfig is None else kind_of(qconfig)
        except TypeError as error:
            raise TypeError(f"{name or 'the model'}: the mapping's {rule}: {error}") from None
        if is_convolution(module) and kind is not None and not kind.needs_calibration:
            continue
        if is_recurrent(module) and kind not in (None, QuantizationKind.DYNAMIC):
            continue
        if kind is None:
            reasons[name] = f"{_BY_RULE}{rule} is None"
            continue
        if kind is QuantizationKind.DYNAMIC and holds_experts(module):
            qconfig, kind = dynamic_experts_qconfig(), QuantizationKind.WEIGHT_ONLY
        reason = _obstacle(module, lineage[1] if path else None, kind, read_weights)
        if reason:
            reasons[name] = reason
        else:
            chosen[name] = qconfig
    return chosen, reasons


def choose_weight_only(mapping: QConfigMapping, model: nn.Module, title: str) -> dict[str, QConfigWoq]:
    """Configurations of the layers of `model` to quantize, by name, for an algorithm that quantizes weights only.

    Raises TypeError for a `mapping` that is none, and ValueError for another kind of configuration, and for NaN or Inf
    in a weight.
    """
    if not isinstance(mapping, QConfigMapping):
        raise TypeError(f"quantization_config: expected a QConfigMapping, got {type(mapping).__name__}")
    chosen, _ = choose_qconfigs(mapping, model)
    for name, qconfig in chosen.items():
        if not isinstance(qconfig, QConfigWoq):
            raise ValueError(
                f"quantization_config: {title} quantizes weights only, use get_weight_only_quant_qconfig_mapping; "
                f"{name} has a {type(qconfig).__name__}"
            )
        layer = model.get_submodule(name)
        if is_linear(layer) and not weight_matrix(layer).isfinite().all():
            raise ValueError(f"{name}: weight: expected finite values, got NaN or Inf")
    return chosen


def _choose_embeddings(
    mapping: QConfigMapping, model: nn.Module, read_weights: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """`choose_qconfigs` for embeddings, which neither the global rule nor a rule for a parent quantizes."""
    tables = {name: module for name, module in model.named_modules() if is_embedding(module)}
    most_rows = max((module.num_embeddings for module in tables.values()), default=0)
    chosen, reasons = {}, {}
    for name, module in tables.items():
        own = name in mapping.module_name_qconfigs
        if not own and _excludes(mapping, name):
            continue
        types = (kind for kind in type(module).__mro__ if kind in mapping.object_type_qconfigs)
        by_type = mapping.object_type_qconfigs.get(next(types, None))
        qconfig = mapping.module_name_qconfigs[name] if own else by_type
        if not isinstance(qconfig, QConfigWoq):
            continue  # torch's own mappings have rules for embeddings, too
        reason = embedding_obstacle(module, read_weights)
        if not own and 2 * module.num_embeddings < most_rows:
            reason = f"{_BY_RULE}rule for its type leaves out small tables; set_module_name quantizes it"
        if reason:
            reasons[name] = reason
        else:
            chosen[name] = qconfig
    return chosen, reasons


def _excludes(mapping: QConfigMapping, name: str) -> bool:
    """Whether a rule for a parent of the module `name`, or a regex that matches it, leaves it in float."""
    for parent in _name_and_parents(name):
        if parent in mapping.module_name_qconfigs:
            return mapping.module_name_qconfigs[parent] is None
    matches = (pattern for pattern in mapping.module_name_regex_qconfigs if re.match(pattern, name))
    return mapping.module_name_regex_qconfigs.get(next(matches, None), False) is None


def _obstacle(module: nn.Module, parent: nn.Module | None, kind: QuantizationKind, read_weights: bool) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return attention_obstacle(module)
    if is_convolution(module):
        return conv_obstacle(module) or (weight_obstacle(module) if read_weights else None)
    if is_linear(module):
        unread = READ_BY_ATTENTION if parent is not None and attention_obstacle(parent) else None
        return unread or obstacle(module) or (weight_obstacle(module) if read_weights else None)
    if is_recurrent(module):
        return recurrent_obstacle(module) or (recurrent_weight_obstacle(module) if read_weights else None)
    if kind is not QuantizationKind.WEIGHT_ONLY:
        return f"experts are quantized weight-only or dynamically, not {kind.value}"
    if holds_expert_linears(module):
        return weight_obstacle(module) if read_weights else None
    return experts_obstacle(module) or (experts_weight_obstacle(module) if read_weights else None)


def refused_modules(reasons: dict[str, str]) -> list[str]:
    """Names of the layers in `reasons` that stay in float though no rule, summary or missing data is the reason."""
    chosen = _BY_RULE, BY_SUMMARY, NEVER_REACHED
    return [name for name, reason in reasons.items() if not reason.startswith(chosen)]


def computes_otherwise(reason: str) -> bool:
    """Whether a layer stays in float because its class has a forward of its own, as routers and the like do."""
    return " overrides " in reason


def fit_reasons(reasons: dict[str, str], model: nn.Module) -> dict[str, str]:
    """`reasons`, with those of projections that `model` lacks under the name of their attention, which is not split."""
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return {name if name in present else name.rpartition(".")[0]: reason for name, reason in reasons.items()}


def _check_rules(mapping: QConfigMapping, model: nn.Module) -> None:
    """Raise ValueError for a kind of rule that is not supported; warn about a module name that `model` lacks."""
    if mapping.module_name_object_type_order_qconfigs:
        raise ValueError("QConfigMapping.set_module_name_object_type_order is not supported; use set_module_name")
    for pattern in mapping.module_name_regex_qconfigs:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"QConfigMapping.set_module_name_regex: {pattern!r} is no regex: {error}") from error
    unknown = mapping.module_name_qconfigs.keys() - {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown -= {name for name, _ in named_layers(model)}
    if unknown:
        warnings.warn(f"QConfigMapping.set_module_name: the model has no module {sorted(unknown)}", stacklevel=4)


def _find_qconfig(mapping: QConfigMapping, name: str, lineage: list[nn.Module]) -> tuple[Any, str]:
    """QConfig of the module `name` and the rule that gave it, by torch's precedence.

    The order is: the rule for its name or for that of its nearest parent, the first regex that matches, the rule for
    its type or for that of its nearest parent, the global rule. `lineage` lists the module and its parents, innermost
    first.
    """
    for prefix in _name_and_parents(name):
        if prefix in mapping.module_name_qconfigs:
            return mapping.module_name_qconfigs[prefix], f"set_module_name({prefix!r})"
    for pattern, qconfig in mapping.module_name_regex_qconfigs.items():
        if re.match(pattern, name):
            return qconfig, f"set_module_name_regex({pattern!r})"
    for module in lineage:
        cls = nn.MultiheadAttention if is_split_attention(module) else type(module)
        if cls in mapping.object_type_qconfigs:
            return mapping.object_type_qconfigs[cls], f"set_object_type({cls.__name__})"
    return mapping.global_qconfig, "set_global"


def _name_and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
