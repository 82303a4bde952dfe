"""Layout of modules that hold the experts of a layer in 3-D parameters, as transformers does."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..numerics.scheme import FLOAT_DTYPES
from ..ops import ExpertGate, PostOp

PROJECTIONS = ("gate_up", "down")

_FLAGS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""Attributes in which transformers' ``use_experts_implementation`` keeps the layout of a class."""


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of a module's expert weights, and how the module is called.

    - `gated`: gate and up are in one parameter, ``gate_up_proj``; otherwise there is only ``up_proj``.
    - `transposed`: input features come before output features.
    - `concatenated`: gate is above up; otherwise their rows alternate.
    - `batched`: called with ``[E * T, H]``, T rows for each expert in turn, instead of tokens and their experts.
    """

    gated: bool = True
    biased: bool = False
    transposed: bool = False
    concatenated: bool = True
    batched: bool = False

    @property
    def blocks(self) -> int:
        """Projections that read the input of an expert."""
        return 2 if self.gated else 1

    def parameter(self, projection: str) -> str:
        """Name of the parameter with the weights of a projection; that of its biases ends in ``_bias``."""
        return "up_proj" if projection == "gate_up" and not self.gated else f"{projection}_proj"


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """Layout of the experts of `module`, None if unknown; without transformers' attributes, a run finds it."""
    if all(hasattr(module, name) for name in (*_FLAGS, "_apply_gate")):
        flags = (module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated)
        return ExpertLayout(*map(bool, flags))
    return _BATCHED if _batched_gate(module) is not None else None


_BATCHED = ExpertLayout(transposed=True, batched=True)


def experts_obstacle(module: nn.Module) -> str | None:
    """Reason why `WeightOnlyQuantizedExperts` cannot replace `module`, which holds experts, or None."""
    layout = expert_layout(module)
    if layout is None:
        return f"{type(module).__name__} does not tell how its experts are laid out"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts have a norm"
    names = {layout.parameter(projection) for projection in PROJECTIONS}
    expected = names | ({f"{name}_bias" for name in names} if layout.biased else set())
    if set(module._parameters) != expected or not _shapes_fit(module, layout):
        return "the parameters of its experts are none that are known"
    if expert_gate(module) is None:
        return "the activation of its experts has no kernel"
    return None


def experts_weight_obstacle(module: nn.Module) -> str | None:
    """Reason why the weights of `module`, which holds experts, cannot be quantized, or None."""
    layout = expert_layout(module)
    for weight in (getattr(module, layout.parameter(projection)) for projection in PROJECTIONS):
        if weight.dtype not in FLOAT_DTYPES:
            return f"its weight is {weight.dtype}, not float32, bfloat16 or float16"
        if weight.device.type != "cpu":
            return f"its weight is on device {weight.device}, not cpu"
    return None


def experts_shape(module: nn.Module) -> tuple[int, int, int]:
    """``(experts, hidden_size, intermediate_size)`` of a module that holds experts."""
    experts, rows, columns = module.down_proj.shape
    return (experts, columns, rows) if expert_layout(module).transposed else (experts, rows, columns)


def expert_weight(module: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """Float weight of one expert, whatever the module's layout: gate above up ``[2 * I, H]``, or up alone ``[I, H]``;
    or down ``[H, I]``.
    """
    layout = expert_layout(module)
    weight = getattr(module, layout.parameter(projection))[expert].detach()
    weight = weight.t() if layout.transposed else weight
    return weight if projection == "down" or layout.concatenated else _separated(weight, 0)


def set_expert_weights(module: nn.Module, projection: str, weights: torch.Tensor) -> None:
    """Replace the weights of a projection: `expert_weight` then returns ``weights[expert]``, in the dtype it had."""
    layout = expert_layout(module)
    if projection == "gate_up" and not layout.concatenated:
        weights = torch.stack(weights.chunk(2, dim=1), dim=2).flatten(1, 2)
    parameter = getattr(module, layout.parameter(projection))
    parameter.data = (weights.transpose(1, 2) if layout.transposed else weights).to(parameter.dtype).contiguous()


def expert_bias(module: nn.Module, projection: str) -> torch.Tensor | None:
    """Float32 biases, gate before up ``[E, 2 * I]`` or up alone ``[E, I]``, or of down ``[E, H]``; None if they are
    zeros or not there.
    """
    layout = expert_layout(module)
    bias = getattr(module, f"{layout.parameter(projection)}_bias", None)
    if bias is None or not bias.any():
        return None
    bias = bias.detach().to(torch.float32, copy=True)
    return bias if projection == "down" or layout.concatenated else _separated(bias, 1)


def set_expert_biases(module: nn.Module, projection: str, biases: torch.Tensor | None) -> None:
    """Set the biases of a projection of `module`, if it has any, as `expert_bias` returns them; None sets zeros."""
    parameter = getattr(module, f"{projection}_proj_bias", None)
    if parameter is None:
        return
    if biases is not None and projection == "gate_up" and not module.is_concatenated:
        biases = torch.stack(biases.chunk(2, dim=1), dim=2).flatten(1)
    parameter.data = torch.zeros_like(parameter) if biases is None else biases.to(parameter.dtype, copy=True)


def expert_gate(module: nn.Module) -> ExpertGate | None:
    """The gate of `module`, which holds experts, found by running it; None for a gate without a kernel."""
    layout = expert_layout(module)
    if layout.batched:
        return _batched_gate(module)
    generator = torch.Generator("cpu").manual_seed(0)
    # Explicit, since the defaults are those of the model while it is loaded.
    kind: dict[str, Any] = {
        "dtype": torch.float32,
        "device": "cpu",
    }
    x = torch.randn(5, 64, generator=generator, **kind) * torch.tensor([1e-2, 1.0, 5.0, 50.0, 1e4], **kind)[:, None]
    parts = x.chunk(layout.blocks, dim=1) if layout.concatenated else (x[:, ::2], x[:, 1::2])
    try:
        with torch.no_grad():
            # Without a gate, the functions that transformers has for experts call the activation alone.
            result = (module._apply_gate if layout.gated else module.act_fn)(x.clone())
            known = (each for each in _gates(module, layout.gated) if _close(result, each(*parts)))
            return next(known, None)
    except Exception:  # any failure of foreign code means an unknown gate
        return None


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(result, expected, rtol=1e-4, atol=1e-6)


def _gates(module: nn.Module, gated: bool) -> list[ExpertGate]:
    plain = [PostOp.SILU, PostOp.NEW_GELU, PostOp.GELU]
    if not gated:
        return [ExpertGate(activation, gated=False) for activation in (*plain, PostOp.RELU, PostOp.RELU2)]
    limits = [getattr(module, name, None) for name in ("limit", "swiglu_limit")]
    slopes = [1.0, *(getattr(module, name, None) for name in ("alpha", "swiglu_alpha"))]
    return [ExpertGate(activation) for activation in plain] + [
        ExpertGate(PostOp.SILU, (float(limit), float(slope), offset))
        for limit in limits
        for slope in slopes
        for offset in (0.0, 1.0)
        if limit is not None and slope is not None
    ]


def _batched_gate(module: nn.Module) -> ExpertGate | None:
    """The gate of a module that multiplies ``[E * T, H]`` by ``gate_up_proj`` ``[E, H, 2 * I]`` and ``down_proj``
    ``[E, I, H]`` in batches, as Llama 4's; None for any other.

    It is run with small weights; attributes that equal one of its sizes are adjusted to them meanwhile.
    """
    up, down = (module._parameters.get(f"{projection}_proj") for projection in PROJECTIONS)
    if set(module._parameters) != {"gate_up_proj", "down_proj"} or not up.dim() == down.dim() == 3:
        return None
    experts, width, hidden = down.shape
    if tuple(up.shape) != (experts, hidden, 2 * width) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    small = {hidden: 12, width: 8, 2 * width: 16} | ({width: 12, 2 * width: 24} if hidden == width else {})
    small |= {hidden: 16} if hidden == 2 * width else {}
    small[experts] = small.get(experts, 3)
    sizes = small[experts], small[hidden], small[width]
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    count, rows, columns = sizes
    weights = {"gate_up_proj": random(count, rows, 2 * columns), "down_proj": random(count, columns, rows)}
    x = random(count * 5, rows)
    probe = copy.copy(module)
    numbers = {name: small[v] for name, v in vars(module).items() if type(v) is int and v in small}
    probe.__dict__ |= {**numbers, "_parameters": weights}
    try:
        with torch.no_grad():
            result = type(module).forward(probe, x.clone())
            gate, up = torch.bmm(x.view(count, 5, rows), weights["gate_up_proj"]).chunk(2, dim=-1)
            for each in _gates(module, True):
                expected = torch.bmm(each(gate, up), weights["down_proj"]).view(-1, rows)
                if result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-4, atol=1e-4):
                    return each
    except Exception:  # any failure of foreign code means an unknown gate
        return None
    return None


def _shapes_fit(module: nn.Module, layout: ExpertLayout) -> bool:
    if module.down_proj.dim() != 3 or module.down_proj.numel() == 0:
        return False
    experts, hidden, width = experts_shape(module)
    rows, up = layout.blocks * width, layout.parameter("gate_up")
    shapes = {
        up: (experts, hidden, rows) if layout.transposed else (experts, rows, hidden),
        f"{up}_bias": (experts, rows),
        "down_proj": tuple(module.down_proj.shape),
        "down_proj_bias": (experts, hidden),
    }
    return experts == getattr(module, "num_experts", experts) and all(
        tuple(parameter.shape) == shapes[name] for name, parameter in module._parameters.items()
    )


def _separated(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Reorder `tensor`, in which gate and up alternate along `dim`: all of gate, then all of up."""
    every = torch.arange(tensor.shape[dim])
    return tensor.index_select(dim, torch.cat((every[::2], every[1::2])))
