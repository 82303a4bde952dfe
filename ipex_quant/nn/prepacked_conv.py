"""Convolutions with a packed weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .prepacked import PrepackedLayer

_pointwise = torch.ops.mkldnn._convolution_pointwise.default
_transpose_pointwise = torch.ops.mkldnn._convolution_transpose_pointwise.default


class PrepackedConv(PrepackedLayer):
    """The forward of an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``; its results are channels last.

    The layout of the weight depends on the input's shape, and oneDNN is slow with the one for another shape. So a
    weight is packed for the shape that two calls in a row have; others run unpacked.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._shape: torch.Size | None = None

    @staticmethod
    def suits(module: nn.Module) -> bool:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def _fits(self, input: torch.Tensor) -> bool:
        return input.dim() == self.module.weight.dim() and input.shape[1] == self.module.in_channels

    def _operate(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.module._conv_forward(input, weight, bias)

    def _compute(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        key, seen = (dtype, *self._geometry(input.shape)), input.shape == self._shape
        self._shape = input.shape
        if not seen and not self._weight.holds([weight], key):
            return self._compute_plainly(input, weight, bias, dtype)
        packed = self._weight.of([weight], key, lambda: self._pack(weight.to(dtype), *key[1:]))
        return self._convolve(input.to(dtype), packed, None if bias is None else bias.to(dtype))

    def _geometry(self, shape: torch.Size) -> tuple[Any, ...]:
        """Arguments of oneDNN's reordering of a weight."""
        module = self.module
        return module.padding, module.stride, module.dilation, module.groups, tuple(shape)

    @staticmethod
    def _pack(weight: torch.Tensor, *geometry: Any) -> torch.Tensor:
        if weight.dim() == 3:  # oneDNN has no one-dimensional convolutions
            padding, stride, dilation, groups, (n, c, length) = geometry
            weight = weight.unsqueeze(2)
            geometry = ((0, *padding), (1, *stride), (1, *dilation), groups, (n, c, 1, length))
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry)

    def _convolve(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        module = self.module
        padding, stride, dilation = module.padding, module.stride, module.dilation
        flat = input.dim() == 3
        if flat:
            input, padding, stride, dilation = input.unsqueeze(2), (0, *padding), (1, *stride), (1, *dilation)
        result = _pointwise(input, weight, bias, padding, stride, dilation, module.groups, "none", [], "")
        return result.squeeze(2) if flat else result


class PrepackedConvTranspose(PrepackedConv):
    """The forward of an ``nn.ConvTranspose2d`` or ``nn.ConvTranspose3d``; its results are channels last."""

    @staticmethod
    def suits(module: nn.Module) -> bool:
        # Not where it adds more than a stride, nor depthwise.
        sizes = zip(module.padding, module.output_padding, module.stride, strict=True)
        depthwise = 1 < module.groups == module.in_channels
        return not depthwise and all(padding - added + stride > 0 for padding, added, stride in sizes)

    def _operate(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        module, transpose = self.module, F.conv_transpose2d if input.dim() == 4 else F.conv_transpose3d
        sizes = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
        return transpose(input, weight, bias, *sizes)

    def _geometry(self, shape: torch.Size) -> tuple[Any, ...]:
        padding, *rest = super()._geometry(shape)
        return padding, self.module.output_padding, *rest

    @staticmethod
    def _pack(weight: torch.Tensor, *geometry: Any) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *geometry)

    def _convolve(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        module = self.module
        sizes = (module.padding, module.output_padding, module.stride)
        return _transpose_pointwise(input, weight, bias, *sizes, module.dilation, module.groups, "none", [], "")
