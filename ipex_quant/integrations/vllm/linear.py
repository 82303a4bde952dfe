"""Kernels for the linear layers of checkpoints that vLLM reads by itself: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_INT8_KERNELS,
    _POSSIBLE_KERNELS,
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearKernel,
    MPLinearLayerConfig,
    register_linear_kernel,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from ...checkpoints.gptq import read_gptq
from ...numerics.int8 import StaticActivation
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import FLOAT_DTYPES, PER_CHANNEL
from ...ops.int8 import INT8_PER_CHANNEL
from .options import compute_modes, log_compute_mode
from .packed import PackedInt8Linear, PackedWoqLinear

_SYMMETRIC = (scalar_types.uint4b8, scalar_types.uint8b128)
_TYPES = (scalar_types.uint4, *_SYMMETRIC)


class WoqKernel(MPLinearKernel):
    """Weights of 4 or 8 bits with one scale per group or row, as GPTQ, AWQ and compressed-tensors store them.

    By default activations are quantized to INT8 per token and group for 4-bit weights, which is faster than vLLM's own
    W4A16 and rounds more; `options.LOWP_VARIABLE` chooses.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether the kernel takes such a layer, else a reason."""
        if c.weight_type not in _TYPES or (c.weight_type in _SYMMETRIC) == c.zero_points:
            return False, f"weights of type {c.weight_type} {'with' if c.zero_points else 'without'} zero points"
        if c.act_type not in FLOAT_DTYPES:
            return False, f"activations of {c.act_type}"
        size = c.group_size
        if size != PER_CHANNEL and (size <= 0 or size & (size - 1)):
            return False, f"groups of {size}, which is no power of two"
        columns = c.partition_weight_shape[0]
        if size != PER_CHANNEL and columns != c.full_weight_shape[0] and columns % size:
            return False, f"{columns} input features of a rank, which cut a group of {size}"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weight in place of the plain one, and drop its scales and zero points."""
        weight = self._read(layer)
        modes = compute_modes(weight.scheme.dtype.bits)
        self.linear = PackedWoqLinear(weight, layer.bias, modes)
        _keep_only(layer, self.w_q_name, self.linear.data, (self.w_s_name, self.w_zp_name))
        log_compute_mode(weight.scheme.dtype.bits, modes[0])

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear.forward(x, bias)

    def _read(self, layer: torch.nn.Module) -> QuantizedWeight:
        words, scales, zeros = self._get_weight_params(layer)
        columns, rows = self.config.partition_weight_shape
        bits = self.config.weight_type.size_bits
        if words.input_dim != words.packed_dim:
            raise ValueError(f"{self.w_q_name}: expected words along the input features")
        groups = scales.data if scales.output_dim == 1 else scales.data.t()
        tensors = {"qweight": words.data if words.input_dim == 0 else words.data.t(), "scales": groups}
        if self.config.zero_points:
            tensors["qzeros"] = zeros.data if zeros.output_dim == 1 else zeros.data.t()
        else:
            tensors["qzeros"] = _middle_zeros(bits, len(groups), rows)
        return read_gptq(tensors, bits, self.config.group_size, v2=True, shape=(rows, columns))


class Int8Kernel(Int8ScaledMMLinearKernel):
    """W8A8: weights with a scale per output feature or module, activations with static scales or one per token."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Every layer."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weight in place of the plain one, and drop the other parameters."""
        codes, scales, *_ = self._get_layer_params(layer)
        rows = torch.tensor(layer.logical_widths)
        scales = scales.data.float().flatten()
        if len(scales) != len(codes):
            scales = scales.repeat_interleave(rows if len(scales) == len(rows) else len(codes))
        weight = QuantizedWeight(
            codes.data.contiguous(), scales[:, None].contiguous(), None, None, INT8_PER_CHANNEL, tuple(codes.shape)
        )
        self.linear = PackedInt8Linear(weight, layer.bias, self._activation(layer))
        name, *others = self.layer_param_names
        _keep_only(layer, name, self.linear.data, others)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear.forward(x, bias)

    def _activation(self, layer: torch.nn.Module) -> StaticActivation | None:
        """The static quantization of the input, the widest if the parts of a joined layer have several."""
        if not self.config.is_static_input_scheme:
            return None
        _, _, scales, zeros, _ = self._get_layer_params(layer)
        scales = scales.data.float().flatten()
        if self.config.input_symmetric:
            return StaticActivation(float(scales.max()), 128)
        zeros = zeros.data.flatten().int()
        if len(scales) > 1:
            low, high = (scales * (-128 - zeros)).min(), (scales * (127 - zeros)).max()
            scale = (high - low) / 255
            return StaticActivation(float(scale), int((-low / scale).round().clamp(0, 255)))
        return StaticActivation(float(scales[0]), int(zeros[0]) + 128)


def register() -> None:
    """Put the kernels before vLLM's own; again without effect."""
    for kind, kernels, ours in (("mp", _POSSIBLE_KERNELS, WoqKernel), ("int8", _POSSIBLE_INT8_KERNELS, Int8Kernel)):
        if ours not in kernels.get(PlatformEnum.CPU, []):
            register_linear_kernel(ours, PlatformEnum.CPU, kind)
            # Registration appends, and the first kernel that can implement a layer is taken.
            kernels[PlatformEnum.CPU].insert(0, kernels[PlatformEnum.CPU].pop())


def _middle_zeros(bits: int, groups: int, rows: int) -> torch.Tensor:
    """Packed zero points of symmetric codes, ``[groups, rows / codes of a word]``."""
    middle = 1 << (bits - 1)
    word = sum(middle << shift for shift in range(0, 32, bits)) - (1 << 32)
    return torch.full((groups, -(-rows * bits // 32)), word, dtype=torch.int32)


def _keep_only(layer: torch.nn.Module, name: str, data: torch.Tensor, others: tuple[str | None, ...]) -> None:
    """Make `data` the parameter `name` of `layer`, and set the `others` to None."""
    replace_parameter(layer, name, torch.nn.Parameter(data, requires_grad=False))
    for other in others:
        if other is not None and other in layer._parameters:
            layer.register_parameter(other, None)
