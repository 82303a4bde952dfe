"""MLPs of models whose code transformers does not have: what a module computes is found by trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...nn.fused_forward import fused_forward, restore_forwards
from ...ops.post_op import ACTIVATIONS, GATES, PostOp
from .layer import FusedLayer
from .linears import MLP_ACTIVATIONS
from .mlp import FusedMlp
from .trial import features, linear_children, others_have_hooks, same, with_stand_ins
from .watched_forward import WatchedForward


class OwnMlp(WatchedForward):
    """Replaces the `forward` of an MLP that no fused decoder layer contains."""

    def __init__(self, module: nn.Module, mlp: FusedMlp) -> None:
        super().__init__(module)
        self.mlp = mlp

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or self.needs_stock(args[0]):
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.mlp(args[0])


def fuse_mlps(model: nn.Module) -> list[str]:
    """Let every MLP of `model` outside of fused decoder layers compute in few native calls; return their names.

    `restore_forwards` undoes it.
    """
    restore_forwards(model, OwnMlp)
    names = []
    for name, module in own_modules(model).items():
        mlp = None if "forward" in vars(module) else mlp_of(module)
        if mlp is not None:
            module.forward = OwnMlp(module, mlp)
            names.append(name)
    return names


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model`, by name, that are in no fused decoder layer."""
    layers = (module for module in model.modules() if isinstance(fused_forward(module), FusedLayer))
    fused = {id(inner) for layer in layers for inner in layer.modules()}
    return {name: module for name, module in model.named_modules() if id(module) not in fused}


def mlp_of(module: nn.Module) -> FusedMlp | None:
    """The native form of a module of two or three linears that computes an MLP of its input; None for any other."""
    linears = linear_children(module)
    if len(linears) not in (2, 3) or module._parameters or module._buffers or others_have_hooks(module, linears):
        return None
    sizes = {name: features(linear) for name, linear in linears.items()}
    for output in linears:
        inputs = [name for name in linears if name != output]
        shapes = {sizes[name] for name in inputs}
        width, inner = shapes.pop()
        if shapes or inner not in (sizes[output][0], 2 * sizes[output][0] if len(inputs) == 1 else 0):
            continue
        found = _tried(module, linears, inputs, output, torch.randn(2, 3, width, generator=_generator()))
        if found is not None:
            return found
    return None


def _tried(
    module: nn.Module, linears: dict[str, nn.Module], inputs: list[str], output: str, x: torch.Tensor
) -> FusedMlp | None:
    """The MLP with these `inputs` and `output`, if the module's own code computes one of `x`."""
    probe, stand_ins = with_stand_ins(module, linears, 4.0)
    try:
        with torch.no_grad():
            result = type(module).forward(probe, x)
    except Exception:  # its forward takes other arguments, or needs more of its linears
        return None
    if any(len(each.inputs) != 1 for each in stand_ins.values()):
        return None
    if not same(result, stand_ins[output].results[0]) or not all(same(stand_ins[name].inputs[0], x) for name in inputs):
        return None
    given, values = stand_ins[output].inputs[0], {name: stand_ins[name].results[0] for name in inputs}
    if len(inputs) == 2:
        for gate, up in (inputs, inputs[::-1]):
            post_op = _activation(given, values[gate], values[up], MLP_ACTIVATIONS)
            if post_op is not None:
                return FusedMlp([linears[gate], linears[up]], linears[output], post_op, True)
        return None
    value = values[inputs[0]]
    gated = value.shape != given.shape
    if gated:
        post_op = _activation(given, *value.chunk(2, dim=-1), GATES)
    else:
        post_op = _activation(given, value, None, MLP_ACTIVATIONS)
    return None if post_op is None else FusedMlp([linears[inputs[0]]], linears[output], post_op, gated)


def _activation(
    given: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, known: Sequence[PostOp]
) -> PostOp | None:
    """The activation of `known` for which `given` is that of `gate`, times `up` if there is one."""
    for post_op in known:
        expected = ACTIVATIONS[post_op](gate)
        if same(given, expected if up is None else expected * up, 1e-5):
            return post_op
    return None


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
