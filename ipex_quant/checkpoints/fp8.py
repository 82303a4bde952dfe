"""FP8 checkpoints of the `quant_method` "fp8": DeepSeek's, whose scales are of blocks, and GPTQModel's.

A linear with weight ``[N, K]`` is stored as `weight` float8 e4m3 ``[N, K]`` and `weight_scale_inv`:

- ``[ceil(N / rows), ceil(K / columns)]``, a factor of each block of `weight_block_size` ``[rows, columns]``, or a
  single factor of the whole weight: ``w = weight * weight_scale_inv``;
- GPTQModel's, which `weight_scale_semantics` "inverse" tells: ``w = weight / weight_scale_inv``, a true inverse, of
  each row ``[N]``, of the whole weight or of blocks.

Experts may be stacked: `gate_up_proj` ``[E, 2 * W, H]``, gate first, `down_proj` ``[E, H, W]``, and each with
`_scale_inv`, of blocks of every expert.

The scale of a block becomes that of each of its rows, so that nothing is rounded. Activations are not quantized.
Sources: transformers' ``finegrained_fp8`` integration, GPTQModel's ``FP8Config``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES
from ..reading import shown
from .file_tensors import ExpertRows, Stored
from .format import CheckpointFormat, made_by_gptqmodel
from .tensors import check, check_rank, e8m0_scales, fp8_weight, require, shape_or_stored, spread_blocks

_WEIGHT, _SCALE = "weight", "weight_scale_inv"
_STACKED = re.compile(r"^(?P<experts>.+)\.(?P<part>gate_up|down)_proj(?P<scale>_scale_inv)?$")


@dataclass(frozen=True)
class Fp8Format(CheckpointFormat):
    """How the modules of one FP8 checkpoint are stored: blocks of `block` ``(rows, columns)``, `inverse` scales or not.

    Raises ValueError for a `block` that is no pair of sizes.
    """

    block: tuple[int, int] | None = None
    inverse: bool = False
    halves: bool = False

    keys = (_WEIGHT, _SCALE, "activation_scale", "input_scale")

    def __post_init__(self) -> None:
        if self.block is not None and not (len(self.block) == 2 and all(type(n) is int and n > 0 for n in self.block)):
            raise ValueError(f"weight_block_size: expected two sizes, got {shown(self.block)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Fp8Format:
        """The format that a `quantization_config` describes; raises ValueError for another float8 type."""
        dtype = config.get("fmt") or config.get("format") or "e4m3"
        if dtype not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(f"fmt: expected 'e4m3', got {shown(dtype)}")
        semantics = config.get("weight_scale_semantics")
        if semantics not in (None, "inverse"):
            raise ValueError(f"weight_scale_semantics: expected 'inverse' or none, got {shown(semantics)}")
        block = config.get("weight_block_size")
        if block is not None and not isinstance(block, (list, tuple)):
            raise ValueError(f"weight_block_size: expected two sizes, got {shown(block)}")
        pair: Any = None if block is None else tuple(block)
        return cls(pair, semantics == "inverse", made_by_gptqmodel(config))

    def presented(self, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """`tensors` with ``<experts>.<index>.gate_proj.weight`` and so on in place of stacks.

        Raises ValueError for stacks that cannot be taken apart.
        """
        result: dict[str, Stored] = {}
        for name, tensor in tensors.items():
            found = _STACKED.match(name)
            stack = found and f"{found['experts']}.{found['part']}_proj"
            if not found or f"{stack}_scale_inv" not in tensors or f"{stack}" not in tensors:
                result[name] = tensor
                continue
            parts = ("gate", "up") if found["part"] == "gate_up" else ("down",)
            if tensor.dim() != 3 or 0 in tensor.shape or (tensor.shape[1] % len(parts) and not found["scale"]):
                raise ValueError(f"{name}: expected a stack of experts, got shape {list(tensor.shape)}")
            size, rest = divmod(tensor.shape[1], len(parts))
            one = found["scale"] and tensor.shape[1] == 1  # for the whole of each expert
            across = self.block is not None and size % self.block[0] and not found["scale"]
            if len(parts) == 2 and not one and (rest or across):
                raise ValueError(f"{name}: blocks go across gate and up, of {size} rows each; nothing here holds them")
            for expert in range(tensor.shape[0]):
                for number, part in enumerate(parts):
                    rows = slice(None) if one else slice(number * size, (number + 1) * size)
                    own = ExpertRows(tensor, expert, rows)
                    result[f"{found['experts']}.{expert}.{part}_proj.weight{found['scale'] or ''}"] = own
        return result

    def quantizes(self, stored: Collection[str]) -> bool:
        """A weight alone is a float one."""
        return _SCALE in stored

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError for scales of another shape than the configuration says."""
        weight, scales = require(tensors, (_WEIGHT, _SCALE))
        check_rank(_WEIGHT, weight, 2)
        rows, columns = shape_or_stored(shape, weight.shape)
        check(_WEIGHT, weight, (torch.float8_e4m3fn,), (rows, columns))
        if scales.dtype == torch.float8_e8m0fnu:
            scales = e8m0_scales(scales.view(torch.uint8))
        if scales.numel() == 1:
            scales, group = scales.reshape(1, 1), columns
        elif self.block is not None:
            group = self.block[1]
            check(_SCALE, scales, FLOAT_DTYPES, (-(-rows // self.block[0]), -(-columns // group)))
        else:
            if not self.inverse:
                raise ValueError(
                    f"{_SCALE}: {list(scales.shape)} without weight_block_size and weight_scale_semantics: nothing "
                    "tells whether it multiplies or divides"
                )
            check(_SCALE, scales, FLOAT_DTYPES, (rows,))
            scales, group = scales[:, None], columns
        scales = 1.0 / scales.float() if self.inverse else scales.float()
        return fp8_weight(weight, spread_blocks(scales, rows, self.block), group)
