"""GPTQ for every linear in the transformer blocks of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..nn.linears import weight_matrix
from ..numerics.affine import dequantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .gptq import GptqOptions, HessianAccumulator, quantize_compensated
from .gptq_experts import can_quantize_experts, quantize_experts
from .layer_walk import SchemeOf, Walk, calibrate, calibrate_pairs, find_stages, first_names, set_weight, walk_blocks


def quantize_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme | SchemeOf,
    options: GptqOptions | None = None,
    also: Sequence[str] = (),
) -> dict[str, QuantizedWeight]:
    """GPTQ for linears and experts in the transformer blocks of `model` and those of `also`, as `walk_blocks` does it.

    Experts in 3-D parameters are in the result one by one, as `quantize_experts` names them.
    """
    options = options or GptqOptions()
    scheme_of = (lambda name: scheme) if isinstance(scheme, WeightScheme) else scheme
    blocks = _GptqBlocks(scheme_of, options)
    weights = walk_blocks(model, batches, scheme_of, blocks, options.scale_dtype, also)
    if blocks.idle:
        warnings.warn(
            f"GPTQ: no calibration token is routed to {len(blocks.idle)} experts ({first_names(blocks.idle)}); they "
            "are rounded to nearest. Calibrate on more text, or text of more kinds",
            stacklevel=4,
        )
    return weights


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError or RuntimeError with the name of the layer that it is about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from error


def compensate_block(
    walk: Walk, index: int, schemes: Mapping[str, WeightScheme], options: GptqOptions
) -> dict[str, tuple[QuantizedWeight, torch.Tensor]]:
    """`quantize_compensated` for the linears of block `index`, by name, which get the dequantized weights.

    With `options.correction`, `Walk.record_float` must have been called for all blocks so far.
    """
    block = walk.blocks[index]
    collect = calibrate_pairs if options.correction else calibrate
    found: dict[str, tuple[QuantizedWeight, torch.Tensor]] = {}
    for stage in find_stages(walk, index, list(schemes)):
        for members, seen in zip(stage.groups, collect(walk, index, stage, HessianAccumulator), strict=True):
            for name in members if seen.count else ():
                linear = block.get_submodule(name)
                with named(walk.full_name(index, name)):
                    found[name] = quantize_compensated(
                        weight_matrix(linear), seen.hessian, schemes[name], options, seen.shift
                    )
                set_weight(linear, dequantize(found[name][0]))
    return found


class _GptqBlocks:
    title = "GPTQ"

    def __init__(self, scheme_of: SchemeOf, options: GptqOptions) -> None:
        self.scheme_of = scheme_of
        self.options = options
        self.idle: list[str] = []

    def __call__(self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme]) -> dict[str, QuantizedWeight]:
        block = walk.blocks[index]
        if self.options.correction:
            walk.record_float(index)
        found = {name: weight for name, (weight, _) in compensate_block(walk, index, schemes, self.options).items()}
        for name in [name for name, module in block.named_modules() if can_quantize_experts(module)]:
            scheme = self.scheme_of(walk.full_name(index, name))
            if scheme is not None:
                with named(walk.full_name(index, name)):
                    experts, idle = quantize_experts(walk, index, name, scheme, self.options)
                found |= experts
                self.idle += [walk.full_name(index, each) for each in idle]
        return found
