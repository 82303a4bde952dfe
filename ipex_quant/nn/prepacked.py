"""Float layers that compute with a copy of their weight in the layout that oneDNN multiplies with."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import nn

from ..numerics.scheme import FLOAT_DTYPES
from ..ops.float_linear import float_linear, has_few_rows
from ..ops.gradient import needs_gradient
from .fused_forward import FusedForward, restore_forwards
from .widened_linear import widened_linear

_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


_SLOW = frozenset(
    dtype
    for dtype, is_fast in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if not is_fast
)
"""The dtypes that oneDNN, for want of instructions of this CPU, leaves to kernels that take several times as long."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply tensors of `dtype` on this CPU: itself, or float32."""
    return torch.float32 if dtype in _SLOW else dtype


class Derived:
    """Something made of parameters, which is made again after one of them was replaced, or changed in place.

    Writes through the ``data`` attribute of a parameter are not noticed, since torch does not count them. What is made
    is neither saved nor copied.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, tuple[Any, ...], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": None}

    def holds(self, sources: Sequence[torch.Tensor], key: Any) -> bool:
        """Whether what was made last is of `sources`, as they are now, and of `key`."""
        return self._made is not None and self._made[0] == (versions(sources), key)

    def of(self, sources: Sequence[torch.Tensor], key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, which reads `sources` and `key` alone, or what it made last."""
        state, made = (versions(sources), key), self._made
        if made is None or made[0] != state or None in state[0]:
            with torch.inference_mode(False), torch.no_grad():
                # With references to the old values their addresses cannot be used again.
                made = self._made = (state, tuple(source.detach() for source in sources), make())
        return made[2]


def versions(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, int, torch.dtype] | None, ...]:
    """What changes with each tensor; None for one of inference mode, whose changes torch does not count."""
    return tuple(None if x.is_inference() else (x.data_ptr(), x._version, x.dtype) for x in tensors)


class Prepacked(FusedForward):
    """Replaces the `forward` of a layer by one that computes in `compute_dtype`, with `Derived` weights.

    The layer keeps its parameters. Operators of torch run instead where a gradient is needed, in `torch.compile`,
    `torch.jit` and `torch.func`, and for subclasses of tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether oneDNN computes the layer `module`."""
        return True

    def stock_module(self) -> nn.Module:
        """The layer without this forward, for `torch.jit.script`."""
        module = copy.copy(self.module)
        restore_prepacked(module)
        return module

    @classmethod
    def _is_observed(cls, input: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
        """Whether anything wants to see operators of torch."""
        return needs_gradient(input, *parameters) or cls._is_transformed(input)

    @staticmethod
    def _is_transformed(input: torch.Tensor) -> bool:
        """Whether operators of torch are not just computed."""
        return (
            type(input) is not torch.Tensor
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
        )


class PrepackedLayer(Prepacked):
    """The forward of a layer with a `weight`, of which it has a packed copy, and a `bias`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._weight = Derived()
        self._result: ref[torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_result": None}

    def __call__(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self.module
        weight, bias = module.weight, module.bias
        dtype = result_dtype(input, weight)
        if args or kwargs or dtype is None:
            return type(module).forward(module, input, *args, **kwargs)
        computed = compute_dtype(dtype)
        if self._is_observed(input, weight, bias) or input.numel() == 0 or not self._fits(input):
            if input.dtype == computed == dtype:
                return type(module).forward(module, input)
            return self._compute_plainly(input, weight, bias, computed).to(dtype)
        result = self._compute(input, weight, bias, computed).to(dtype)
        self._result = ref(result)
        return result

    def gives_away(self, x: torch.Tensor) -> bool:
        """Whether `x` is the last result, made without a gradient, and no hook of the layer has seen it."""
        return self._result is not None and self._result() is x and not self.module._forward_hooks

    def _compute_plainly(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The result in `dtype` by torch's own operator."""
        with torch.autocast("cpu", enabled=False):
            return self._operate(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @abstractmethod
    def _fits(self, input: torch.Tensor) -> bool:
        """Whether the stock forward takes an input of this shape."""

    @abstractmethod
    def _operate(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The result by torch's own operator for arguments of one dtype."""

    @abstractmethod
    def _compute(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The result in `dtype`, with a packed copy of `weight` where that is faster."""


class PrepackedLinear(PrepackedLayer):
    """The forward of an ``nn.Linear``, which reads its own weight, not the copy, where the input has few rows."""

    def _fits(self, input: torch.Tensor) -> bool:
        return input.dim() > 0 and input.shape[-1] == self.module.in_features

    def _operate(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(input, weight, bias)

    def _compute_plainly(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if dtype != torch.float32 or self._is_transformed(input):
            return super()._compute_plainly(input, weight, bias, dtype)
        return widened_linear(input, weight, bias)

    def _compute(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        own = weight.dtype
        if has_few_rows(input, weight) and not (
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != own
        ):
            return float_linear(input.to(own), weight, None if bias is None else bias.to(own))
        return self._multiply(input, weight, bias, dtype)

    def _multiply(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        packed = self._weight.of([weight], dtype, lambda: pack_linear(weight.to(dtype)))
        return multiply_packed(input.to(dtype), packed, None if bias is None else bias.to(dtype))


def multiply_packed(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` with a weight of `pack_linear`; all in one dtype."""
    return _linear_pointwise(input, packed, bias, "none", [], "")


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """`weight` ``[N, K]`` in oneDNN's layout, as an opaque tensor."""
    return _reorder(weight)


class InPlaceActivation(Prepacked):
    """The forward of an activation that alone reads the results of `layer`: it writes over them.

    `operate` is the activation in place. Anything but such a result is left as it is.
    """

    def __init__(
        self, module: nn.Module, layer: PrepackedLayer, operate: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(module)
        self.layer = layer
        self.operate = operate

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and self.layer.gives_away(input):
            return self.operate(input)
        return type(self.module).forward(self.module, input)


def result_dtype(input: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """The dtype of a layer's result; None where a layer of torch raises an error.

    Without autocast, a layer in a lower precision takes float32 as well, and computes as under autocast.
    """
    given = {input.dtype, weight.dtype}
    if {input.device.type, weight.device.type} != {"cpu"} or not given <= set(FLOAT_DTYPES):
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype if input.dtype in (weight.dtype, torch.float32) else None


def prepack(forward: Prepacked) -> None:
    """Let the module of `forward` compute by it, until `restore_prepacked`."""
    forward.module.forward = forward
    vars(forward.module)["__prepare_scriptable__"] = forward.stock_module  # a hook of torch.jit.script


def restore_prepacked(model: nn.Module) -> None:
    """Undo `prepack` in every module of `model`."""
    restore_forwards(model, Prepacked)
    for module in model.modules():
        vars(module).pop("__prepare_scriptable__", None)
