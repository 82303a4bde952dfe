"""Quantization parameters of layers, from the observers of their inputs and from their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.linears import is_linear, weight_matrix
from ..numerics.int8 import StaticActivation
from ..observers import has_data, observe
from ..smoothquant.scaling import bounded_factors, smooth_activation
from .errors import naming
from .observed import LayerParameters, ObservedGroup
from .qconfig import QuantizationKind


def group_parameters(model: nn.Module, group: ObservedGroup) -> list[LayerParameters | None]:
    """Parameters of the layers of `group`: from its observer, or without data those of a loaded summary."""
    if group.observer is not None and not has_data(group.observer):
        return [layer.parameters for layer in group.layers]
    modules = {layer.name: model.get_submodule(layer.name) for layer in group.layers}
    return layer_parameters(group.kind, group.observer, modules, group.layers[0].qconfig)


def layer_parameters(
    kind: QuantizationKind,
    observer: Any,
    modules: Mapping[str, nn.Module],
    qconfig: Any,
    alpha: float | None = None,
    channels: Any = None,
) -> list[LayerParameters]:
    """Parameters of the layers `modules`, by name, which read one tensor; `observer` has observed it.

    A dynamic `kind` has no observer. `qconfig` makes the observers of the weights. For SmoothQuant, `alpha` overrides
    the observer's, and `channels`, an observer per input channel, the observer's own. Raises ValueError, naming the
    layer, for weights or observers that cannot be used.
    """
    if kind is not QuantizationKind.SMOOTH_QUANT:
        activation = None if observer is None else _plain_activation(observer)
        return [LayerParameters(activation, _weight_scales(*each, qconfig)) for each in modules.items()]
    alpha = observer.alpha if alpha is None else alpha
    channels = observer.ic_obs if channels is None else channels
    together = [modules] if qconfig.share_weight_observers else [{name: modules[name]} for name in modules]
    return [parameters for each in together for parameters in _smoothed(each, channels, alpha, qconfig)]


def _plain_activation(observer: Any) -> StaticActivation:
    """Parameters of an activation that is not smoothed, with unsigned codes."""
    scale, zero_point = observer.calculate_qparams()
    shift = 128 if getattr(observer, "act_obs", observer).dtype == torch.qint8 else 0  # makes signed codes unsigned
    return StaticActivation(float(scale), int(zero_point) + shift)


def _smoothed(modules: Mapping[str, nn.Module], channels: Any, alpha: float, qconfig: Any) -> list[LayerParameters]:
    """Parameters of linear layers that share one smoothing factor."""
    weights = {name: weight_matrix(module).float() for name, module in modules.items()}
    across = qconfig.weight().ic_obs
    for name, weight in weights.items():
        with naming(name, "weight"):
            observe(across, weight)
    ranges = channels.min_val, channels.max_val, across.min_val, across.max_val
    act_factor, factor = bounded_factors(*ranges, alpha)
    activation = smooth_activation(channels.min_val, channels.max_val, act_factor)
    scales = [observed_scales(name, qconfig.weight().oc_obs, weight * factor) for name, weight in weights.items()]
    return [LayerParameters(activation, each, factor) for each in scales]


def _weight_scales(name: str, module: nn.Module, qconfig: Any) -> torch.Tensor:
    observer = qconfig.weight()
    weight = weight_matrix(module) if is_linear(module) else module.weight.detach()
    return observed_scales(name, getattr(observer, "oc_obs", observer), weight.float())


def observed_scales(name: str, observer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Scales, float32 ``[N]``, that `observer` finds for the `weight` of the module `name`.

    Raises ValueError unless the observer is symmetric, of dtype qint8, and per-tensor or per output channel.
    """
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    with naming(name, "weight"):
        observe(observer, weight)
        scales, _ = observer.calculate_qparams()
        if scales.numel() not in (1, len(weight)) or not symmetric or observer.dtype != torch.qint8:
            raise ValueError(
                f"{type(observer).__name__}: expected symmetric qint8, per tensor or per output channel; use "
                "PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)"
            )
    return scales.float().expand(len(weight)).contiguous()
