"""Modules that hold the experts of a layer in 3-D parameters, as transformers does: how they are laid out."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import ExpertGate, PostOp
from .linears import FLOAT_DTYPES

PROJECTIONS = ("gate_up", "down")

_LAYOUT = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""Attributes by which transformers' ``use_experts_implementation`` tells how a class lays its experts out."""


def experts_obstacle(module: nn.Module) -> str | None:
    """Why `WeightOnlyQuantizedExperts` cannot stand where `module`, which holds experts, is; None when it can."""
    if not all(hasattr(module, name) for name in (*_LAYOUT, "_apply_gate")):
        return f"{type(module).__name__} does not tell how its experts are laid out"
    if not module.has_gate or module.has_post_expert_norm:
        return "its experts have " + ("a norm" if module.has_gate else "no gate")
    expected = {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if module.has_bias else set())
    if set(module._parameters) != expected or not _shapes_fit(module):
        return "the parameters of its experts are none that are known"
    if expert_gate(module) is None:
        return "the activation of its experts has no kernel"
    return None


def experts_weight_obstacle(module: nn.Module) -> str | None:
    """Why the weights of `module`, which holds experts, cannot be quantized; None when they can."""
    for weight in (module.gate_up_proj, module.down_proj):
        if weight.dtype not in FLOAT_DTYPES:
            return f"its weight is {weight.dtype}, not float32, bfloat16 or float16"
        if weight.device.type != "cpu":
            return f"its weight is on device {weight.device}, not cpu"
    return None


def experts_shape(module: nn.Module) -> tuple[int, int, int]:
    """``(experts, hidden_size, intermediate_size)`` of a module that holds experts."""
    experts, rows, columns = module.down_proj.shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


def expert_weight(module: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """Float weight of one expert: gate above up ``[2 * I, H]``, or down ``[H, I]``, whatever the module's layout."""
    weight = getattr(module, f"{projection}_proj")[expert].detach()
    weight = weight.t() if module.is_transposed else weight
    return weight if projection == "down" or module.is_concatenated else _separated(weight, 0)


def set_expert_weights(module: nn.Module, projection: str, weights: torch.Tensor) -> None:
    """Give a projection of `module` new data: what `expert_weight` returns is now ``weights[expert]``, of its dtype."""
    if projection == "gate_up" and not module.is_concatenated:
        weights = torch.stack(weights.chunk(2, dim=1), dim=2).flatten(1, 2)
    parameter = getattr(module, f"{projection}_proj")
    parameter.data = (weights.transpose(1, 2) if module.is_transposed else weights).to(parameter.dtype).contiguous()


def expert_bias(module: nn.Module, projection: str) -> torch.Tensor | None:
    """Float32 biases, gate before up ``[E, 2 * I]``, or of down ``[E, H]``; None if they are zeros or not there."""
    bias = getattr(module, f"{projection}_proj_bias", None)
    if bias is None or not bias.any():
        return None
    bias = bias.detach().to(torch.float32, copy=True)
    return bias if projection == "down" or module.is_concatenated else _separated(bias, 1)


def expert_gate(module: nn.Module) -> ExpertGate | None:
    """What the gate of `module`, which holds experts, computes, found by trying it; None for one without a kernel."""
    generator = torch.Generator("cpu").manual_seed(0)
    kind = {"dtype": torch.float32, "device": "cpu"}  # while a model is loaded, the defaults are its own
    x = torch.randn(5, 64, generator=generator, **kind) * torch.tensor([1e-2, 1.0, 5.0, 50.0, 1e4], **kind)[:, None]
    gate, up = x.chunk(2, dim=1) if module.is_concatenated else (x[:, ::2], x[:, 1::2])
    try:
        with torch.no_grad():
            result = module._apply_gate(x.clone())
            known = (each for each in _gates(module) if torch.allclose(result, each(gate, up), rtol=1e-4, atol=1e-6))
            return next(known, None)
    except Exception:  # whatever goes wrong in code that is not ours, it is none of those known
        return None


def _gates(module: nn.Module) -> list[ExpertGate]:
    gates = [ExpertGate(activation) for activation in (PostOp.SILU, PostOp.NEW_GELU, PostOp.GELU)]
    limits = [getattr(module, name, None) for name in ("limit", "swiglu_limit")]
    slopes = [1.0, *(getattr(module, name, None) for name in ("alpha", "swiglu_alpha"))]
    return gates + [
        ExpertGate(PostOp.SILU, (float(limit), float(slope), offset))
        for limit in limits
        for slope in slopes
        for offset in (0.0, 1.0)
        if limit is not None and slope is not None
    ]


def _shapes_fit(module: nn.Module) -> bool:
    if module.down_proj.dim() != 3 or module.down_proj.numel() == 0:
        return False
    experts, hidden, width = experts_shape(module)
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "gate_up_proj_bias": (experts, 2 * width)}
    if module.is_transposed:
        shapes["gate_up_proj"] = (experts, hidden, 2 * width)
    shapes |= {"down_proj": tuple(module.down_proj.shape), "down_proj_bias": (experts, hidden)}
    return experts == module.num_experts and all(
        tuple(parameter.shape) == shapes[name] for name, parameter in module._parameters.items()
    )


def _separated(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """What alternates between gate and up along `dim`: all of gate, then all of up."""
    every = torch.arange(tensor.shape[dim])
    return tensor.index_select(dim, torch.cat((every[::2], every[1::2])))
