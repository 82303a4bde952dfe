"""The MXFP4 checkpoints of gpt-oss: experts in 4-bit floats with a power of two for each 32 of them.

A stack of E weights ``[N, K]`` is stored as `<projection>_blocks` uint8 ``[E, N, K / 32, 16]``, two codes a byte with
the first in the low bits, and `<projection>_scales` uint8 ``[E, N, K / 32]``, exponents plus 127. Rows of gate and up
alternate in `gate_up_proj`. Biases are floats ``[E, N]``. Source: transformers' ``mxfp4`` integration, OCP's
Microscaling Formats 1.0.

The values 0, 0.5, 1, 1.5, 2, 3, 4 and 6 doubled are integers, which INT8 weights hold exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..numerics.quantized_weight import QuantizedWeight
from .file_tensors import ExpertRows, Stored
from .format import CheckpointFormat
from .tensors import check, check_rank, e2m1_weight, e8m0_scales, require, shape_or_stored

GROUP = 32

_BLOCKS, _SCALES = "blocks", "scales"
_STACKED = re.compile(r"^(?P<experts>.+)\.(?P<part>gate_up|down)_proj_(?P<key>blocks|scales|bias)$")
_ROWS = {"gate_up": {"gate": slice(0, None, 2), "up": slice(1, None, 2)}, "down": {"down": slice(None)}}
"""Rows of each stored projection that are a part of an expert."""


class Mxfp4Format(CheckpointFormat):
    """How the experts of a gpt-oss checkpoint are stored."""

    keys = (_BLOCKS, _SCALES)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mxfp4Format:
        """The format; nothing in a `quantization_config` is needed."""
        return cls()

    def presented(self, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """`tensors` with ``<experts>.<index>.gate_proj.blocks`` and so on in place of the stacks."""
        result: dict[str, Stored] = {}
        for name, tensor in tensors.items():
            found = _STACKED.match(name)
            stacked = found and f"{found['experts']}.{found['part']}_proj_{_BLOCKS}" in tensors
            if not found or not stacked:
                result[name] = tensor
                continue
            if tensor.dim() < 2 or 0 in tensor.shape:
                raise ValueError(f"{name}: expected a stack of experts, got shape {list(tensor.shape)}")
            for expert in range(tensor.shape[0]):
                for part, rows in _ROWS[found["part"]].items():
                    result[f"{found['experts']}.{expert}.{part}_proj.{found['key']}"] = ExpertRows(tensor, expert, rows)
        return result

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one part of an expert; ValueError or TypeError for tensors that do not fit."""
        blocks, scales = require(tensors, (_BLOCKS, _SCALES))
        check_rank(_BLOCKS, blocks, 3)
        rows, columns = shape_or_stored(shape, (blocks.shape[0], blocks.shape[1] * GROUP))
        check(_BLOCKS, blocks, (torch.uint8,), (rows, columns // GROUP, GROUP // 2))
        check(_SCALES, scales, (torch.uint8,), (rows, columns // GROUP))
        return e2m1_weight(blocks.flatten(1), e8m0_scales(scales), GROUP, (rows, columns))
