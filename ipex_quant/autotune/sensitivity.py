"""The error of each layer's output when it is quantized, on the sample of its input that calibration kept.

The error of a layer is ``|y - y'|^2 / |y|^2`` over the sample, with `y` its float output and `y'` the quantized one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..conversion.example import Example
from ..conversion.observed import LayerParameters
from ..nn.linears import is_convolution, is_linear, weight_matrix
from ..numerics.affine import dequantize
from ..numerics.int8 import ACTIVATION_MAX, StaticActivation, quantize_per_channel
from ..smoothquant.tracing import input_tensor

COMBINE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": lambda errors: sum(errors) / len(errors),
    "max": max,
}
"""Functions that combine the errors of the layers of a share group, by neural-compressor's names."""


@torch.no_grad()
def int8_errors(
    modules: Sequence[nn.Module], sample: torch.Tensor, parameters: Sequence[LayerParameters]
) -> list[float]:
    """The errors of `modules`, which read the same `sample`, when quantized with their `parameters`."""
    errors = []
    quantized: tuple[StaticActivation | None, torch.Tensor] = (None, sample)
    for module, own in zip(modules, parameters, strict=True):
        if own.activation is not quantized[0]:
            quantized = own.activation, _rounded(sample.float(), own.activation)
        exact = _output(module, sample.float(), module.weight.detach().float())
        errors.append(relative_error(exact, _output(module, quantized[1], _rounded_weight(module, own))))
    return errors


@torch.no_grad()
def block_error(block: nn.Module, call: Example, parameters: Mapping[nn.Module, LayerParameters]) -> float:
    """The error of a transformer `block`'s output for `call` when its layers are quantized with `parameters`."""
    exact = _first_tensor(block(*call.args, **call.kwargs))
    with ExitStack() as stack:
        for module, own in parameters.items():
            handle = module.register_forward_hook(
                partial(_simulate, own, _rounded_weight(module, own)), with_kwargs=True
            )
            stack.callback(handle.remove)
        return relative_error(exact, _first_tensor(block(*call.args, **call.kwargs)))


def relative_error(exact: torch.Tensor, actual: torch.Tensor) -> float:
    """``|actual - exact|^2 / |exact|^2``."""
    change, power = ((value.float()).square().sum() for value in (actual - exact, exact))
    return float(change / power.clamp(min=torch.finfo(torch.float32).tiny))


def _simulate(
    own: LayerParameters, weight: torch.Tensor, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor
) -> torch.Tensor:
    """Forward hook that returns the output of the quantized layer."""
    result = _output(module, _rounded(input_tensor(args, kwargs).float(), own.activation), weight)
    if module.bias is not None:
        places = 0 if is_linear(module) else len(module.kernel_size)
        result += module.bias.float().reshape(-1, *[1] * places)
    return result.to(output.dtype)


def _output(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Output of `module` for `x` without its bias, with `weight`, in the module's layout, in place of its own."""
    if is_convolution(module):
        return module._conv_forward(x, weight, None)
    return nn.functional.linear(x, weight if isinstance(module, nn.Linear) else weight.t())


def _rounded(sample: torch.Tensor, activation: StaticActivation) -> torch.Tensor:
    """The activation after quantization and dequantization, still multiplied by the smoothing factor."""
    codes = ((sample * activation.multiplier).round() + activation.zero_point).clamp(0, ACTIVATION_MAX)
    return (codes - activation.zero_point) * activation.scale


def _rounded_weight(module: nn.Module, parameters: LayerParameters) -> torch.Tensor:
    """The weight, for smoothed inputs, after quantization and dequantization, in the layout of `module`."""
    weight = weight_matrix(module).float() if is_linear(module) else module.weight.detach().float().flatten(1)
    if parameters.weight_factor is not None:
        weight = weight * parameters.weight_factor
    rounded = dequantize(quantize_per_channel(weight, parameters.weight_scales))
    if not is_linear(module):
        return rounded.reshape(module.weight.shape)
    return rounded if isinstance(module, nn.Linear) else rounded.t()


def _first_tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output
