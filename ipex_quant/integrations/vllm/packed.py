"""Packed linear layers as vLLM calls them: from many modules, with few lines of Python for each call."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...nn.int8_linear import QuantizedInput
from ...numerics.int8 import StaticActivation
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import WoqActQuantMode, WoqLowpMode
from ...ops import PostOp, pack_int8, pack_weight, woq_embedding
from ...ops.library import native

_woq_linear = native.woq_linear.default
_int8_linear = native.int8_linear.default
_quantize = native.quantize_activation.default
_quantize_per_token = native.quantize_activation_per_token.default
_NO_POST_OP = int(PostOp.NONE)

Modes = tuple[WoqLowpMode, WoqActQuantMode]
"""How a weight-only quantized weight is multiplied."""


class PackedWoqLinear:
    """A weight-only quantized linear; `data` and `perm` are those of its packed weight, `bias` is in float32."""

    static_input = None  # of a W8A8 one

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        modes: Modes,
    ) -> None:
        packed = pack_weight(weight)
        self.data, self.perm = packed.data, packed.perm
        self._in_features = weight.shape[1]
        self.bias = None if bias is None else bias.detach().float()
        self.modes = tuple(map(int, modes))
        self._out_features = weight.shape[0]

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T``, plus the bias unless `bias` is None: ranks after the first leave it to that one."""
        return _woq_linear(
            x,
            self.data,
            None if bias is None else self.bias,
            self.perm,
            (),
            self._out_features,
            *self.modes,
            _NO_POST_OP,
        )

    def with_modes(self, modes: Modes) -> PackedWoqLinear:
        """The same weight, multiplied in another way."""
        linear = copy.copy(self)
        linear.modes = tuple(map(int, modes))
        return linear

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight, ``[*indices.shape, in_features]`` in `dtype`."""
        return woq_embedding(self.data, indices, self._in_features, self.perm, dtype)


class PackedInt8Linear:
    """A W8A8 linear; `data` is its packed weight, `bias` in float32, `static_input` that of `DecoderWeights`.

    `activation` is the static quantization of the input; None quantizes every token to its own range.
    """

    perm = modes = None  # of a weight-only quantized one

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, activation: StaticActivation | None) -> None:
        self.data = pack_int8([weight]).data
        self.bias = None if bias is None else bias.detach().float()
        self._out_features = (weight.shape[0],)
        self._static = self.static_input = None
        if activation is not None:
            quantized = QuantizedInput(activation)
            self._static = quantized.multiplier, activation.zero_point, quantized.scale, quantized.zero_point
            self.static_input = quantized.joined(weight.shape[1])

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T``, plus the bias unless `bias` is None."""
        if self._static is None:
            codes, scales, zero_points = _quantize_per_token(x)
        else:
            multiplier, zero_point, scales, zero_points = self._static
            codes = _quantize(x, multiplier, zero_point)
        own_bias = None if bias is None else self.bias
        return _int8_linear(
            codes, scales, zero_points, self.data, own_bias, (), self._out_features, x.dtype, _NO_POST_OP
        )[0]


class FloatLinear:
    """A linear with a float weight, for parts of a joined layer that are not quantized."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.data = weight.clone()
        self._bias = bias

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T``, plus the bias unless `bias` is None."""
        return F.linear(x, self.data, None if bias is None else self._bias)


class JoinedLinears:
    """Linears of one input, whose results are joined: parts of a layer that are quantized differently."""

    def __init__(self, linears: Sequence[PackedWoqLinear | PackedInt8Linear | FloatLinear]) -> None:
        self.linears = tuple(linears)

    @property
    def data(self) -> torch.Tensor:
        """The weight of the first one."""
        return self.linears[0].data

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The results of all, side by side."""
        return torch.cat([linear.forward(x, bias) for linear in self.linears], dim=-1)


PackedLinear = PackedWoqLinear | PackedInt8Linear | FloatLinear | JoinedLinears
