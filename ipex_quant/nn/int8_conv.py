"""`Int8Conv`: a convolution in 8 bits."""

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
from .linears import conv_obstacle, is_convolution
from .memory_format import auto_channels_last, is_channels_last
from .quantized_module import Placeholder, QuantizedModule, autocast, check_bias, flag, read_activation


class Int8Conv(QuantizedModule):
    """An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` whose input and weight are quantized to 8 bits.

    The weight is ``[out, in / groups, *kernel_size]``, `x` float32, bfloat16 or float16 ``[N, in, *spatial]`` or
    ``[in, *spatial]`` on the CPU; the result has its dtype, or autocast's under torch.autocast, and no gradient. As
    with torch's convolutions it is channels last if `x` is, or if the float weight was, or where `auto_channels_last`
    is asked for. `from_float` makes a module.

    The state dict holds plain tensors: `codes` int8 in the shape of the weight, `scales` float32 ``[out, 1]``,
    `input_scale` float32 ``[1]``, `input_zero_point` int32 ``[1]``, and `bias` float32 if there is one.
    """

    kind = "int8_conv"
    entry_names = frozenset(("bias",))
    weight_names = ("codes", "scales", "input_scale", "input_zero_point")

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.channels_last = is_channels_last(conv.weight) or auto_channels_last(default=False)
        self.activation = StaticActivation(1.0, 0)
        self.register_buffer("_data", None, persistent=False)
        self.register_buffer("_scales", None, persistent=False)
        self.register_buffer("_bias", None, persistent=False)
        self.register_buffer("_multiplier", None, persistent=False)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        activation: StaticActivation,
        scales: torch.Tensor | None = None,
    ) -> Int8Conv:
        """Quantize the weight of `conv`, one scale per output channel, for an input quantized as `activation` says.

        The `scales` of the weight, float32 ``[out]``, are computed from it unless given. Raises ValueError for a
        convolution that `conv_obstacle` refuses, for a smoothing factor, and for a weight with NaN or Inf.
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
        dims = len(self.kernel_size)
        if not torch.jit.is_tracing():  # tracing would warn that it cannot record the check
            self._check(x, dims)
        x = autocast(x).detach()
        channels_last, batched = self.channels_last or not x.is_contiguous(), x.dim() == dims + 2
        before, after = self._paddings()
        if self.padding_mode != "zeros":
            sides = [side for each in reversed([*zip(before, after, strict=True)]) for side in each]
            x = F.pad(x if batched else x[None], sides, mode=self.padding_mode)
            before = after = (0,) * dims
        act = self.activation
        codes = self._codes(x if x.dim() == dims + 2 else x[None])
        geometry = ops.ConvGeometry(self.stride, before, after, self.dilation)
        y = ops.int8_conv(codes, act.scale, act.zero_point, self._packed, self._bias, geometry, x.dtype)
        y = y.movedim(-1, 1)  # the kernel writes channels last
        if not channels_last:
            y = y.contiguous()
        return y if batched else y[0]

    def _check(self, x: torch.Tensor, dims: int) -> None:
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            places = ", ".join("DHW"[-dims:]) if dims > 1 else "L"
            raise RuntimeError(f"x: expected [N, {self.in_channels}, {places}] or without N, got {list(x.shape)}")

    @property
    def _packed(self) -> ops.PackedConv:
        return ops.PackedConv(self._data, self._scales, self.weight_shape, self.groups)

    def _codes(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the input; returns channels last, as the kernel reads it."""
        last = x.movedim(1, -1)
        if last.is_contiguous():
            return ops.quantize_activation(last, self._multiplier, self.activation.zero_point)
        return ops.quantize_activation(x, self._multiplier, self.activation.zero_point).movedim(1, -1).contiguous()

    def _paddings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Padding before and after the input in each dimension."""
        if self.padding == "valid":
            return (0,) * len(self.kernel_size), (0,) * len(self.kernel_size)
        if self.padding != "same":
            return tuple(self.padding), tuple(self.padding)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out, in / groups, *kernel_size)``."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has a single input channel, and there are several groups."""
        return self._packed.is_depthwise

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        tensors = (self._data, self._scales, self._multiplier, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def quantized_weight(self) -> QuantizedWeight:
        """The plain form of the weight, one row per output channel, in new tensors."""
        return ops.unpack_conv(self._packed)

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The real values of the weight, in a new tensor."""
        return ops.conv_dequantize(self._packed, dtype)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Weight, bias, and scale and zero point of the input, as the state dict has them."""
        qw = self.quantized_weight()
        tensors = {
            "codes": qw.codes.view(self.weight_shape),
            "scales": qw.scales,
            "input_scale": torch.tensor([self.activation.scale], dtype=torch.float32),
            "input_zero_point": torch.tensor([self.activation.zero_point], dtype=torch.int32),
        }
        return tensors if self._bias is None else tensors | {"bias": self._bias}

    def describe(self) -> dict[str, Any]:
        """Whether there is a bias; the float convolution tells the rest."""
        return {"bias": self._bias is not None}

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder for the convolution `module`; ValueError for a module that cannot be quantized."""
        if not is_convolution(module) or conv_obstacle(module):
            raise ValueError(f"expected a convolution that can be quantized, got a {type(module).__name__}")
        rows, shape = module.out_channels, tuple(module.weight.shape)
        tensors = {
            "codes": (torch.int8, shape),
            "scales": (torch.float32, (rows, 1)),
            "input_scale": (torch.float32, (1,)),
            "input_zero_point": (torch.int32, (1,)),
            "bias": (torch.float32, (rows,)) if flag(entry, "bias") else None,
        }
        place = Placeholder(shape, entry, tensors)
        vars(place)["conv"] = module  # not as a child, whose tensors would be loaded
        return place

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[Int8Conv]:
        """Make one module of each placeholder; ValueError or TypeError for tensors that do not fit."""
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
            **({} if self.padding_mode == "zeros" else {"padding_mode": self.padding_mode}),
        }
        settings = ", ".join(f"{name}={value}" for name, value in fields.items())
        return f"{self.in_channels}, {self.out_channels}, {settings}"

    def _set_weight(self, qw: QuantizedWeight, activation: StaticActivation) -> None:
        packed = ops.pack_conv(qw, self.kernel_size, self.groups)
        self.activation, self._multiplier = activation, activation.multiplier
        self._data, self._scales = packed.data, packed.scales

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
        # Pickles may be read by another version, so they hold plain weights.
        buffers = {**self._buffers, "_data": None}
        return {**self.__dict__, "_buffers": buffers, "_plain": self.quantized_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain = state.pop("_plain")
        super().__setstate__(state)
        self._set_weight(plain, self.activation)
