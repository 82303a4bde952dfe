"""GPTQ for every linear in the transformer blocks of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..nn.linears import weight_matrix
from ..numerics.affine import dequantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .gptq import GptqOptions, HessianAccumulator, quantize_weight
from .layer_walk import SchemeOf, Walk, calibrate, find_stages, set_weight, walk_blocks


def quantize_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme | SchemeOf,
    options: GptqOptions | None = None,
) -> dict[str, QuantizedWeight]:
    """GPTQ for every linear in the transformer blocks of `model`, as `walk_blocks` goes through them."""
    options = options or GptqOptions()
    return walk_blocks(model, batches, scheme, _GptqBlocks(options), options.scale_dtype)


class _GptqBlocks:
    title = "GPTQ"

    def __init__(self, options: GptqOptions) -> None:
        self.options = options

    def __call__(self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme]) -> dict[str, QuantizedWeight]:
        block = walk.blocks[index]
        found: dict[str, QuantizedWeight] = {}
        for stage in find_stages(walk, index, list(schemes)):
            for members, seen in zip(stage.groups, calibrate(walk, index, stage, HessianAccumulator), strict=True):
                for name in members if seen.count else ():
                    linear = block.get_submodule(name)
                    weight = weight_matrix(linear)
                    found[name] = quantize_weight(weight, seen.hessian, schemes[name], self.options)
                    set_weight(linear, dequantize(found[name]))
        return found
