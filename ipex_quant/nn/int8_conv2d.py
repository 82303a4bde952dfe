"""`Int8Conv2d`: a convolution in 8 bits, by torch's own quantized kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..numerics.int8 import StaticActivation, quantize_per_channel
from ..numerics.quantized_weight import QuantizedWeight
from ..ops.int8 import INT8_PER_CHANNEL
from .linears import conv_obstacle
from .quantized_module import Placeholder, QuantizedModule, autocast, check_bias, flag, read_activation


class Int8Conv2d(QuantizedModule):
    """An ``nn.Conv2d`` whose input and weight ``[out, in / groups, height, width]`` are quantized to 8 bits.

    `x` is float32, bfloat16 or float16 ``[N, C, H, W]`` or ``[C, H, W]`` on the CPU; the result is in its dtype, or
    under torch.autocast in autocast's, and has no gradient. torch.jit cannot trace it. `from_float` makes a module.

    The state dict holds plain tensors: `codes` int8 as the weight, `scales` float32 ``[out, 1]``, `input_scale` float32
    ``[1]``, `input_zero_point` int32 ``[1]``, and `bias` float32 where there is one.
    """

    kind = "int8_conv2d"
    entry_names = frozenset(("bias",))
    weight_names = ("codes", "scales", "input_scale", "input_zero_point")

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.groups = conv.padding, conv.groups
        self.activation = StaticActivation(1.0, 0)
        self.register_buffer("_scales", None, persistent=False)
        self.register_buffer("_bias", None, persistent=False)
        self.register_buffer("_multiplier", None, persistent=False)
        self._packed: torch.Tensor | None = None

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, activation: StaticActivation, scales: torch.Tensor | None = None
    ) -> Int8Conv2d:
        """Quantize the weight of `conv`, one scale per output channel, for an input quantized as `activation` says.

        `scales`, float32 ``[out]``, are those of the weight when given and found from it otherwise.
        Raises ValueError for a convolution that `conv_obstacle` refuses, for smoothing, and for a weight with NaN or
        Inf.
        """
        reason = conv_obstacle(conv)
        if reason:
            raise ValueError(f"conv: cannot be quantized, {reason}")
        if activation.smoothing_factor is not None:
            raise ValueError("activation: expected none with a smoothing factor, which only linear layers take")
        module = cls(conv)
        module._set_weight(quantize_per_channel(conv.weight.detach().flatten(1), scales), activation)
        if conv.bias is not None:
            module._set_bias(conv.bias)
        return module.to(conv.weight.dtype).train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise RuntimeError(f"x: expected [N, {self.in_channels}, H, W] or without N, got {list(x.shape)}")
        x = autocast(x).detach()
        act = self.activation
        codes = ops.quantize_activation(x, self._multiplier, act.zero_point)
        codes, padding = self._padded(codes if x.dim() == 4 else codes[None])
        y = torch.ops.onednn.qconv2d_pointwise(
            *(codes, act.scale, act.zero_point),
            *(self._packed, self._scales, torch.zeros(self.out_channels, dtype=torch.int32), self._bias),
            *(self.stride, padding, self.dilation, self.groups),
            *(1.0, 0, torch.float32),  # the result is not quantized
            *("none", [], ""),  # nor is anything done to it
        ).to(x.dtype)
        if x.is_contiguous():  # the kernel writes channels last
            y = y.contiguous()
        return y if x.dim() == 4 else y[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out, in / groups, height, width)``."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        tensors = (self._packed, self._scales, self._multiplier, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def quantized_weight(self) -> QuantizedWeight:
        """The plain form of the weight, one row an output channel, in new tensors."""
        codes = self._packed.to_dense().flatten(1)
        return QuantizedWeight(codes, self._scales[:, None].clone(), None, None, INT8_PER_CHANNEL, tuple(codes.shape))

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The real values of the weight, in a new tensor."""
        return torch.ops.ipex_quant.int8_conv_dequantize(self._packed, self._scales, dtype)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Weight, bias and what the input is quantized with, as the state dict has them."""
        qw = self.quantized_weight()
        tensors = {
            "codes": qw.codes.view(self.weight_shape),
            "scales": qw.scales,
            "input_scale": torch.tensor([self.activation.scale], dtype=torch.float32),
            "input_zero_point": torch.tensor([self.activation.zero_point], dtype=torch.int32),
        }
        return tensors if self._bias is None else tensors | {"bias": self._bias}

    def describe(self) -> dict[str, Any]:
        """Whether there is a bias; the rest is the float convolution's."""
        return {"bias": self._bias is not None}

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Tensors of the convolution `module`; ValueError when it is none that can be quantized."""
        if not isinstance(module, nn.Conv2d) or conv_obstacle(module):
            raise ValueError(f"expected a Conv2d that can be quantized, got a {type(module).__name__}")
        rows, shape = module.out_channels, tuple(module.weight.shape)
        tensors = {
            "codes": (torch.int8, shape),
            "scales": (torch.float32, (rows, 1)),
            "input_scale": (torch.float32, (1,)),
            "input_zero_point": (torch.int32, (1,)),
            "bias": (torch.float32, (rows,)) if flag(entry, "bias") else None,
        }
        place = Placeholder(shape, entry, tensors)
        vars(place)["conv"] = module  # which is no child, with tensors to load
        return place

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[Int8Conv2d]:
        """One module for each; ValueError or TypeError for tensors that do not fit."""
        modules = []
        for place in loaded:
            module, tensors = cls(place.conv), place.tensors
            module._load_weight(tensors)
            if tensors["bias"] is not None:
                module._set_bias(tensors["bias"])
            modules.append(module)
        return modules

    def extra_repr(self) -> str:
        fields = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self._bias is not None,
        }
        settings = ", ".join(f"{name}={value}" for name, value in fields.items())
        return f"{self.in_channels}, {self.out_channels}, {settings}"

    def _padded(self, codes: torch.Tensor) -> tuple[torch.Tensor, Sequence[int]]:
        """The input and the padding that is left to the kernel, which pads alike on both sides."""
        if self.padding == "valid":
            return codes, (0, 0)
        if self.padding != "same":
            return codes, self.padding
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if all(total % 2 == 0 for total in totals):
            return codes, [total // 2 for total in totals]
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        return F.pad(codes, sides, value=self.activation.zero_point), (0, 0)

    def _set_weight(self, qw: QuantizedWeight, activation: StaticActivation) -> None:
        self.activation = activation
        self._multiplier, self._scales = activation.multiplier, qw.scales.flatten()
        self._packed = torch.ops.onednn.qconv_prepack(
            *(qw.codes.view(self.weight_shape), self._scales, activation.scale, activation.zero_point),
            *(self.stride, (0, 0), self.dilation, self.groups, None),
        )

    def _set_bias(self, bias: torch.Tensor) -> None:
        self._bias = check_bias(bias, self.out_channels)

    def _float_bias(self) -> torch.Tensor | None:
        return self._bias

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        codes = tensors["codes"]
        if tuple(codes.shape) != self.weight_shape:
            raise ValueError(f"codes: expected shape {list(self.weight_shape)}, got {list(codes.shape)}")
        codes = codes.flatten(1)
        qw = QuantizedWeight(codes, tensors["scales"], None, None, INT8_PER_CHANNEL, tuple(codes.shape))
        self._set_weight(qw, read_activation(tensors))

    def __getstate__(self) -> dict[str, Any]:
        # The packed weight depends on the machine, and cannot be copied.
        return {**self.__dict__, "_packed": None, "_plain": self.quantized_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain = state.pop("_plain")
        super().__setstate__(state)
        self._set_weight(plain, self.activation)


# An op, since compilers cannot look into packed weights; no `custom_op`, which asks for their storage in torch 2.10.
torch.library.define("ipex_quant::int8_conv_dequantize", "(Tensor packed, Tensor scales, ScalarType dtype) -> Tensor")


@torch.library.impl("ipex_quant::int8_conv_dequantize", "default")
def _dequantize(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (packed.to_dense().float() * scales[:, None, None, None]).to(dtype)


@torch.library.register_fake("ipex_quant::int8_conv_dequantize")
def _(packed, scales, dtype):
    return scales.new_empty(packed.shape, dtype=dtype)
