"""How far each layer's output is off when it is quantized, on the sample of its input that calibration kept.

The error of a layer is ``|y - y'|^2 / |y|^2`` over the sample, with `y` its float output and `y'` the quantized one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..nn.linears import is_linear, weight_matrix
from ..numerics.affine import dequantize
from ..numerics.int8 import ACTIVATION_MAX, StaticActivation, quantize_per_channel
from ..quantization._observed import LayerParameters

COMBINE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": lambda errors: sum(errors) / len(errors),
    "max": max,
}
"""How the errors of layers that share their input make one, by neural-compressor's names."""


@torch.no_grad()
def int8_errors(
    modules: Sequence[nn.Module], sample: torch.Tensor, parameters: Sequence[LayerParameters]
) -> list[float]:
    """The error of each of `modules`, which read the same `sample`, when quantized with its `parameters`."""
    errors = []
    quantized: tuple[StaticActivation | None, torch.Tensor] = (None, sample)
    for module, own in zip(modules, parameters, strict=True):
        if own.activation is not quantized[0]:
            quantized = own.activation, _rounded(sample.float(), own.activation)
        errors.append(relative_error(module, sample.float(), quantized[1], _rounded_weight(module, own)))
    return errors


@torch.no_grad()
def relative_error(
    module: nn.Module, sample: torch.Tensor, quantized_sample: torch.Tensor, quantized_weight: torch.Tensor
) -> float:
    """The error of one layer, given what it computes with in place of its input and weight."""
    if is_linear(module):
        exact = nn.functional.linear(sample, weight_matrix(module).float())
        actual = nn.functional.linear(quantized_sample, quantized_weight)
    else:
        exact = module._conv_forward(sample, module.weight.detach().float(), None)
        actual = module._conv_forward(quantized_sample, quantized_weight, None)
    return float((actual - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def _rounded(sample: torch.Tensor, activation: StaticActivation) -> torch.Tensor:
    """The activation that the codes stand for, in the smoothed domain."""
    codes = ((sample * activation.multiplier).round() + activation.zero_point).clamp(0, ACTIVATION_MAX)
    return (codes - activation.zero_point) * activation.scale


def _rounded_weight(module: nn.Module, parameters: LayerParameters) -> torch.Tensor:
    """The weight that the codes stand for, for inputs of the smoothed domain."""
    weight = weight_matrix(module).float() if is_linear(module) else module.weight.detach().float().flatten(1)
    if parameters.weight_factor is not None:
        weight = weight * parameters.weight_factor
    rounded = dequantize(quantize_per_channel(weight, parameters.weight_scales))
    return rounded if is_linear(module) else rounded.reshape(module.weight.shape)
