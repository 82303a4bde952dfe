"""Linear layers of the lean decoder: one call for those that share an input, with the post op in its epilogue.

The ops read the packed weights of the modules; no weight is dequantized, copied or joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ... import ops
from ...nn import Int8Linear, WeightOnlyQuantizedLinear
from ...nn.fused_forward import FusedForward, fused_forward, restore_forwards
from ...nn.linears import is_linear, obstacle
from ...ops import PostOp
from ...ops.post_op import ACTIVATIONS, GATES, apply_post_op

MLP_ACTIVATIONS = (PostOp.RELU, *GATES)
"""The activations that fused MLPs compute as post ops."""

_woq_linear = torch.ops.ipex_quant.woq_linear.default
_woq_linear_group = torch.ops.ipex_quant.woq_linear_group.default
_woq_linear_gated = torch.ops.ipex_quant.woq_linear_gated.default


def activation_post_op(activation: Callable[[torch.Tensor], torch.Tensor]) -> PostOp | None:
    """The post op equal to `activation`, found by comparing their values; None when there is none."""
    x = torch.linspace(-12, 12, 1001, dtype=torch.float32)
    y = activation(x)
    for post_op in MLP_ACTIVATIONS:
        if torch.allclose(y, ACTIVATIONS[post_op](x), rtol=1e-5, atol=1e-5):
            return post_op
    return None


def linear_call(module: nn.Module) -> LinearCall:
    """A function that computes `module` and a post op: ``(x, post_op=NONE, *others) -> [..., out_features]``."""
    if _hooked(module):
        return LinearCall(module)
    if type(module) is WeightOnlyQuantizedLinear and module._packed is not None:
        return WeightOnlyCall(module)
    if type(module) is Int8Linear:
        return Int8Call(module)
    return FloatCall(module) if is_linear(module) and _plain(module) else LinearCall(module)


def linear_calls(modules: Sequence[nn.Module]) -> LinearGroup:
    """A function that computes modules that take the same tensor: ``x -> [result of each]``."""
    if len(modules) > 1 and not any(map(_hooked, modules)):
        if _one_share_group(modules):
            return Int8Group(modules)
        if _alike(modules):
            return WeightOnlyGroup(modules)
    return LinearGroup(modules)


class LinearCall:
    """Any module that computes a linear layer, called as a module so that its hooks run."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, *others: torch.Tensor) -> torch.Tensor:
        return apply_post_op(self.module(x), post_op, others)


class FloatCall(LinearCall):
    """An ``nn.Linear``, whose op has the post op in its epilogue where x has few rows."""

    def __call__(self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, *others: torch.Tensor) -> torch.Tensor:
        parameters = self.module._parameters
        return ops.float_linear(x, parameters["weight"], parameters["bias"], post_op, others)


class WeightOnlyCall(LinearCall):
    """A `WeightOnlyQuantizedLinear`, whose op has the post op in its epilogue."""

    def __init__(self, module: WeightOnlyQuantizedLinear) -> None:
        super().__init__(module)
        self.options = module.out_features, int(module.lowp_mode), int(module.act_quant_mode)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The module's own dict of tensors by name."""
        return self.module._buffers

    def __call__(self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, *others: torch.Tensor) -> torch.Tensor:
        tensors = self.module._buffers
        return _woq_linear(
            x, tensors["_packed"], tensors["_bias"], tensors["_perm"], others, *self.options, int(post_op)
        )


class Int8Call(LinearCall):
    """An `Int8Linear`, whose op has the post op in its epilogue if it shares its input with no other."""

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The dict of tensors by name that the share group keeps for the module."""
        return self.module.share_group.tensors[self.module.member]

    def __call__(self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, *others: torch.Tensor) -> torch.Tensor:
        group = self.module.share_group
        if len(group.inputs) > 1:
            return super().__call__(x, post_op, *others)
        return group.multiply(x, post_op, others)[0]


class LinearGroup:
    """Linear modules with the same input, computed one after the other."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.linears = [linear_call(module) for module in modules]

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear in self.linears]

    def gated(self, x: torch.Tensor, activation: PostOp) -> torch.Tensor:
        """``activation(first(x)) * second(x)`` of the two modules."""
        gate, up = self(x)
        if activation not in GATES:
            return ACTIVATIONS[activation](gate) * up
        if activation == PostOp.SILU:
            return ops.silu_mul(gate, up)
        return ops.gelu_mul(gate, up, activation == PostOp.NEW_GELU)


class Int8Group(LinearGroup):
    """All linears of an INT8 share group, in any order."""

    def __init__(self, modules: Sequence[Int8Linear]) -> None:
        super().__init__(modules)
        self.members = [module.member for module in modules]
        self.in_order = self.members == sorted(self.members)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        group = self.modules[0].share_group
        if not group.has_one_input():
            return super().__call__(x)
        results = group.multiply(x)
        return results if self.in_order else [results[member] for member in self.members]

    def gated(self, x: torch.Tensor, activation: PostOp) -> torch.Tensor:
        group = self.modules[0].share_group
        if activation not in GATES or not self.in_order or not group.has_one_input():
            return super().gated(x, activation)
        return group.multiply_gated(x, activation)


class WeightOnlyGroup(LinearGroup):
    """Weight-only linears in one native call, if they have one dtype and group size and one order of input features."""

    def __init__(self, modules: Sequence[WeightOnlyQuantizedLinear]) -> None:
        super().__init__(modules)
        self.out_features = [module.out_features for module in modules]
        self.modes = int(modules[0].lowp_mode), int(modules[0].act_quant_mode)
        self.uniform = len({(module.dtype, module.group_size) for module in modules}) == 1
        self.compared: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        data, biases, perms = self._tensors()
        # The op takes a list of optional tensors, which torch.jit.trace cannot record.
        if torch.jit.is_tracing() or not self.uniform or not self._one_order(perms):
            return super().__call__(x)
        return _woq_linear_group(x, data, biases, perms[0], self.out_features, *self.modes)

    def gated(self, x: torch.Tensor, activation: PostOp) -> torch.Tensor:
        data, biases, perms = self._tensors()
        if activation not in GATES or not self.uniform or not self._one_order(perms):
            return super().gated(x, activation)
        return _woq_linear_gated(x, *data, *biases, perms[0], self.out_features[0], *self.modes, int(activation))

    def one_order(self) -> bool:
        """Whether all have the same order of input features (act-order permutation) now."""
        return self._one_order([module._buffers["_perm"] for module in self.modules])

    def _tensors(self) -> list[list[torch.Tensor | None]]:
        buffers = [module._buffers for module in self.modules]
        return [[tensors[name] for tensors in buffers] for name in ("_packed", "_bias", "_perm")]

    def _one_order(self, perms: list[torch.Tensor | None]) -> bool:
        """Whether `perms` are equal; they are compared again after loading a state dict has replaced them."""
        if all(perm is None for perm in perms):
            return True
        if any(perm is None for perm in perms):
            return False
        if [id(perm) for perm in perms] == [id(perm) for perm in self.compared]:
            return True
        if torch.compiler.is_compiling() or not all(torch.equal(perm, perms[0]) for perm in perms):
            return False
        self.compared = perms
        return True


def _alike(modules: Sequence[nn.Module]) -> bool:
    """Whether all `modules` are weight-only linears of one input, computed in one mode."""
    if not all(type(module) is WeightOnlyQuantizedLinear and module._packed is not None for module in modules):
        return False
    return len({(module.in_features, module.lowp_mode, module.act_quant_mode) for module in modules}) == 1


def _one_share_group(modules: Sequence[nn.Module]) -> bool:
    """Whether `modules` are all the linears of one INT8 share group."""
    if not all(type(module) is Int8Linear for module in modules):
        return False
    group = modules[0].share_group
    members = sorted(module.member for module in modules if module.share_group is group)
    return members == list(range(len(group.inputs))) and len(members) == len(modules)


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module._parameters.get("weight") is not None and obstacle(module) is None


def _hooked(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return "forward" in module.__dict__ and not is_fused(module)


class FusedLinear(FusedForward):
    """Replaces the `forward` of an ``nn.Linear`` by `ops.float_linear`, which is native where x has few rows."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return ops.float_linear(input, self.module.weight, self.module.bias)


def is_fused(module: nn.Module) -> bool:
    """Whether the `forward` of `module` is a `FusedLinear`."""
    return isinstance(fused_forward(module), FusedLinear)


def fuse_linears(model: nn.Module) -> list[str]:
    """Let every ``nn.Linear`` of `model` compute by `ops.float_linear`; return their names.

    Subclasses and modules with a `forward` of their own stay as they are. `restore_forwards` undoes it.
    """
    restore_forwards(model, FusedLinear)
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = FusedLinear(module)
            names.append(name)
    return names
