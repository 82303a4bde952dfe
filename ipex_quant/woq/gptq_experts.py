"""GPTQ for the experts that transformers stacks in 3-D parameters, each calibrated with the tokens routed to it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.linears import holds_experts
from ..nn.stacked_experts import (
    expert_bias,
    expert_gate,
    expert_layout,
    expert_weight,
    experts_obstacle,
    experts_shape,
    set_expert_weights,
)
from ..numerics.affine import dequantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .gptq import GptqOptions, HessianAccumulator, quantize_weight
from .layer_walk import Walk
from .rtn import rtn

PARTS = ("gate", "up", "down")
"""Linear layers of one expert, as checkpoints hold them: ``<experts>.<index>.<part>_proj``."""


def can_quantize_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts in 3-D parameters in a form that this package can compute."""
    return holds_experts(module) and experts_obstacle(module) is None


def quantize_experts(
    walk: Walk, index: int, name: str, scheme: WeightScheme, options: GptqOptions
) -> tuple[dict[str, QuantizedWeight], list[str]]:
    """Quantize the experts `name` of block `index` by GPTQ; return their weights, and the names of idle experts.

    The keys are ``<name>.<expert>.gate_proj``, ``up_proj`` and ``down_proj``. Gate and up share one order of input
    features; their quantized outputs calibrate down. An idle expert, which no token is routed to, is rounded to
    nearest. The module gets the dequantized weights in new memory.
    """
    module = walk.blocks[index].get_submodule(name)
    gate, bias, (count, _, width) = expert_gate(module), expert_bias(module, "gate_up"), experts_shape(module)
    first_parts = PARTS[:2] if gate.gated else PARTS[1:2]
    calls = _calls(walk, index, module)
    found: dict[str, QuantizedWeight] = {}
    idle: list[str] = []
    values: dict[str, list[torch.Tensor]] = {"gate_up": [], "down": []}
    for expert in range(count):
        x = torch.cat([tokens[(chosen == expert).any(dim=-1)] for tokens, chosen in calls]).float()
        idle += [] if len(x) else [f"{name}.{expert}"]
        gate_up = _quantize(expert_weight(module, "gate_up", expert), x, scheme, options)
        values["gate_up"].append(dequantize(gate_up))
        hidden = gate(
            *F.linear(x, values["gate_up"][-1], None if bias is None else bias[expert]).chunk(gate.blocks, dim=-1)
        )
        down = _quantize(expert_weight(module, "down", expert), hidden, scheme, options)
        values["down"].append(dequantize(down))
        for place, part in enumerate(first_parts):
            found[f"{name}.{expert}.{part}_proj"] = _rows(gate_up, place * width, width)
        found[f"{name}.{expert}.{PARTS[2]}_proj"] = down
    for projection, weights in values.items():
        set_expert_weights(module, projection, torch.stack(weights))
    return found, idle


def _calls(walk: Walk, index: int, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each call of `module` in block `index`: the tokens that no mask hides, and the experts that each goes to."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    batched, count = expert_layout(module).batched, experts_shape(module)[0]

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach()
        calls.append((x, torch.arange(count).repeat_interleave(len(x) // count)[:, None] if batched else args[1]))

    handle = module.register_forward_pre_hook(see)
    try:
        for batch_index in walk.reached(index):
            before = len(calls)
            walk.run(index, batch_index)
            for mask in walk.masks(index, batch_index)[:1]:
                repeats = count if batched else 1  # a row of each token for every expert
                calls[before:] = [
                    tuple(tensor[mask.flatten().repeat(repeats)] for tensor in call)
                    if repeats * mask.numel() == len(call[0])
                    else call
                    for call in calls[before:]
                ]
    finally:
        handle.remove()
    if batched:  # a row of zeros is a token of other experts
        calls = [tuple(tensor[(call[0] != 0).any(dim=1)] for tensor in call) for call in calls]
    return calls


def _quantize(
    weight: torch.Tensor, inputs: torch.Tensor, scheme: WeightScheme, options: GptqOptions
) -> QuantizedWeight:
    if len(inputs) == 0:
        return rtn(weight, scheme, options.scale_dtype)
    seen = HessianAccumulator(weight.shape[1])
    seen.add(inputs)
    return quantize_weight(weight, seen.hessian, scheme, options)


def _rows(weight: QuantizedWeight, first: int, count: int) -> QuantizedWeight:
    g_idx = None if weight.g_idx is None else weight.g_idx.clone()  # files hold no tensor twice
    return dataclasses.replace(weight.select(slice(first, first + count)), g_idx=g_idx)
