"""torchao's weight-only checkpoints in safetensors, as transformers saves them.

A linear with weight ``[N, K]`` is stored as

- `_weight_qdata` ``[N, K]``, int8 (also for 4-bit values) or float8 e4m3;
- `_weight_scale` ``[N, groups]`` or ``[N]``;
- `_weight_zero_point` int8 of the same shape, unless it is symmetric.

The weight is ``(qdata - zero_point) * scale``. Values of 4 bits become INT4. Source: torchao's ``Int8Tensor``,
``IntxUnpackedToInt8Tensor`` and ``Float8Tensor``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES
from .format import CheckpointFormat, Int8Input
from .tensors import check, check_rank, fp8_weight, require, shape_or_stored, small_integer_weight

_WEIGHT, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


@dataclass(frozen=True)
class TorchaoFormat(CheckpointFormat):
    """How torchao stores a module; `per_token` says that its activations are quantized to 8 bits, too."""

    per_token: bool = False

    keys = (_WEIGHT, _SCALE, _ZERO)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TorchaoFormat:
        """The format that a `quantization_config` describes."""
        return cls("Int8DynamicActivationInt8Weight" in json.dumps(config.get("quant_type"), default=str))

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError or TypeError for tensors that do not fit each other or `shape`."""
        weight, scales = require(tensors, (_WEIGHT, _SCALE))
        check_rank(_WEIGHT, weight, 2)
        rows, columns = shape_or_stored(shape, weight.shape)
        check(_WEIGHT, weight, (torch.int8, torch.float8_e4m3fn), (rows, columns))
        grid = (rows, scales.numel() // max(rows, 1))
        scales = scales.reshape(grid) if scales.numel() == rows * grid[1] else scales
        check(_SCALE, scales, FLOAT_DTYPES, grid)
        if not grid[1] or columns % grid[1]:
            raise ValueError(f"{_SCALE}: expected groups of one size in {columns} columns, got {list(scales.shape)}")
        group = columns // grid[1]
        if weight.dtype == torch.float8_e4m3fn:
            return fp8_weight(weight, scales.float(), group)
        zero_points = tensors.get(_ZERO)
        if zero_points is not None:
            check(_ZERO, zero_points.reshape(-1), (torch.int8,), (scales.numel(),))
            zero_points = zero_points.reshape(grid)
        return small_integer_weight(weight, scales, zero_points, group)

    def int8_input(self, module_name: str, tensors: Mapping[str, torch.Tensor]) -> Int8Input | None:
        """Every token to its own range, if the configuration says so."""
        return Int8Input() if self.per_token else None
