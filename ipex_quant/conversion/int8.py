"""Replacing observed layers by INT8 modules, with one packed weight per share group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.ao.quantization import QConfig

from ..nn import Int8Conv, Int8Linear
from ..nn.int8_recurrent import int8_recurrent_class
from ..nn.linears import is_linear, weight_matrix
from ..nn.recurrent import is_recurrent
from ..numerics.int8 import StaticActivation, quantize_per_channel, same_activation
from ..numerics.quantized_weight import QuantizedWeight
from ..observers import has_data
from ..smoothquant.folding import fold_into_norm
from ..woq.layer_walk import silent_channels
from .errors import naming
from .observed import LayerParameters, Observed, ObservedGroup, ObservedLayer
from .parameters import group_parameters, observed_scales
from .qconfig import QuantizationKind
from .rules import BY_SUMMARY, NEVER_REACHED

Replacements = dict[str, Callable[[nn.Module], nn.Module]]


def int8_replacements(model: nn.Module, observations: Observed) -> tuple[Replacements, dict[str, str]]:
    """For each observed layer, by name, a function that makes its INT8 module, or the reason why it stays in float.

    The functions fold smoothing factors into norms of `model` where possible. Warns about layers without data, and
    input channels that are smoothed and were always 0.
    """
    replacements: Replacements = {}
    reasons: dict[str, str] = {}
    unreached: list[str] = []
    silent: dict[str, tuple[int, int]] = {}
    for group in observations.groups:
        wanted = [layer for layer in group.layers if layer.quantized]
        reasons |= {layer.name: BY_SUMMARY for layer in group.layers if not layer.quantized}
        if group.observer is not None and not has_data(group.observer):
            unreached += [layer.name for layer in wanted if layer.parameters is None]
            wanted = [layer for layer in wanted if layer.parameters is not None]
        elif wanted and group.kind is QuantizationKind.SMOOTH_QUANT:
            channels = group.observer.ic_obs
            zeros = (channels.min_val == 0) & (channels.max_val == 0)
            silent |= {group.name: (int(zeros.sum()), zeros.numel())} if zeros.any() else {}
        for part in _fused_parts(model, group, wanted):
            if is_linear(model.get_submodule(part.names[0])):
                replacements |= {name: partial(part.successor, model, name) for name in part.names}
            else:
                each = zip(part.names, part.parameters, strict=True)
                replacements |= {name: partial(_convolution, name, parameters) for name, parameters in each}
    if unreached:
        reasons |= dict.fromkeys(unreached, NEVER_REACHED)
        warnings.warn(
            f"calibration never reached {len(unreached)} layers, which stay in float: {', '.join(unreached[:8])}"
            + (", ..." if len(unreached) > 8 else ""),
            stacklevel=4,
        )
    if silent:
        warnings.warn(f"SmoothQuant: {silent_channels(silent, 'their factors are bounded')}", stacklevel=5)
    return replacements, reasons


def recurrent_replacements(model: nn.Module) -> Replacements:
    """For each recurrent layer and cell that `prepare` marked, by name, a function that makes its INT8 module."""
    return {
        name: partial(_recurrent, name, module.qconfig)
        for name, module in model.named_modules()
        if is_recurrent(module) and getattr(module, "qconfig", None) is not None
    }


@dataclass
class _FusedPart:
    """Layers of a share group whose input is quantized alike, so that they share its quantization and one GEMM.

    `producer` is the norm that the smoothing factor may be folded into.
    """

    names: list[str]
    activation: StaticActivation | None
    parameters: list[LayerParameters]
    producer: str | None = None
    _made: dict[str, Int8Linear] | None = None

    def successor(self, model: nn.Module, name: str, module: nn.Module) -> nn.Module:
        """The INT8 module of the layer `name`; the first call makes those of all layers of the part."""
        if self._made is None:
            modules = [model.get_submodule(each) for each in self.names]
            weights = [
                _quantized(name, weight_matrix(each), parameters)
                for name, each, parameters in zip(self.names, modules, self.parameters, strict=True)
            ]
            biases = [each.bias for each in modules]
            # Fold last: the norm must not change if a weight cannot be quantized.
            activation = self.activation if self.producer is None else _folded(model, self.producer, self.activation)
            made = Int8Linear.make_group(weights, biases, activation, modules[0].weight.dtype)
            self._made = dict(zip(self.names, made, strict=True))
        return self._made.pop(name).train(module.training)


def _fused_parts(model: nn.Module, group: ObservedGroup, wanted: Sequence[ObservedLayer]) -> list[_FusedPart]:
    if not wanted:
        return []
    parameters = dict(zip((layer.name for layer in group.layers), group_parameters(model, group), strict=True))
    parts: list[_FusedPart] = []
    for layer in wanted:
        own = parameters[layer.name]
        part = next((part for part in parts if same_activation(part.activation, own.activation)), None)
        if part is None:
            part = _FusedPart([], own.activation, [])
            parts.append(part)
        part.names.append(layer.name)
        part.parameters.append(own)
    if len(parts) == 1 and len(wanted) == len(group.layers):
        parts[0].producer = group.producer
    return parts


def _folded(model: nn.Module, norm: str, activation: StaticActivation | None) -> StaticActivation | None:
    """`activation` without its smoothing factor, if it can be folded into the `norm`, else `activation`."""
    factor = None if activation is None else activation.smoothing_factor
    if factor is not None and fold_into_norm(model.get_submodule(norm), factor):
        return replace(activation, smoothing_factor=None)
    return activation


def _quantized(name: str, weight: torch.Tensor, parameters: LayerParameters) -> QuantizedWeight:
    weight = weight.float()
    with naming(name):
        factor = parameters.weight_factor
        return quantize_per_channel(weight if factor is None else weight * factor, parameters.weight_scales)


def _convolution(name: str, parameters: LayerParameters, module: nn.Module) -> nn.Module:
    with naming(name):
        made = Int8Conv.from_float(module, parameters.activation, parameters.weight_scales)
        return made.train(module.training)


def _recurrent(name: str, qconfig: QConfig, module: nn.Module) -> nn.Module:
    with naming(name):
        cls = int8_recurrent_class(module)
        return cls.from_float(module, lambda weight: observed_scales(name, qconfig.weight(), weight))
