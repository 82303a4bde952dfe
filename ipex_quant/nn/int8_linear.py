"""`Int8Linear`: a linear layer that quantizes its input to 8 bits and multiplies integers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..numerics.int8 import StaticActivation, quantize_per_channel, same_activation
from ..numerics.quantized_weight import QuantizedWeight
from ..ops import PostOp
from ..ops.gradient import needs_function
from ..ops.int8 import INT8_PER_CHANNEL
from .linears import PackedLinear, linear_shape
from .processes import share_with_processes
from .quantized_module import Placeholder, QuantizedModule, autocast, autocast_dtype, check_bias, flag, read_activation

ACTIVATIONS = ("static", "per_token")
"""How the input is quantized: with one scale that calibration found, or every row to its own range."""


class Int8Linear(QuantizedModule, PackedLinear):
    """``y = quantize(x) @ weight.T + bias`` in integers, with an INT8 weight ``[out_features, in_features]``.

    `x` is float32, bfloat16 or float16 ``[..., in_features]`` on the CPU; the result ``[..., out_features]`` has its
    dtype, or autocast's under torch.autocast. The gradient of `x` is that of a matmul with the dequantized weight.
    `make_group` makes modules.

    The modules of a share group hold one packed weight. The first one computes the results of all when it is called;
    the others take theirs when called with the same tensor, and compute alone otherwise. A change of the tensor in
    between shows in its version, which does not count writes through ``.data``; an inference tensor has no version and
    is compared with a copy. A copy of one module alone keeps the weights of the whole group.

    The state dict holds plain tensors: `codes` int8 ``[out_features, in_features]``, `scales` float32
    ``[out_features, 1]``, and, if present, `bias` float32, `smoothing_factor` float32 ``[in_features]``, `input_scale`
    float32 ``[1]`` and `input_zero_point` int32 ``[1]``.
    """

    kind = "int8"
    entry_names = frozenset(("activation", "smoothed", "bias"))
    weight_names = ("codes", "scales", "smoothing_factor", "input_scale", "input_zero_point")

    def __init__(self, share_group: ShareGroup, member: int, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = share_group.packed.in_features
        self.out_features = share_group.packed.out_features[member]
        self.share_group = share_group
        self.member = member
        self._has_bias = has_bias
        self._float = self._float.to(dtype)

    @classmethod
    def make_group(
        cls,
        weights: Sequence[QuantizedWeight],
        biases: Sequence[torch.Tensor | None],
        activation: StaticActivation | None,
        dtype: torch.dtype,
    ) -> list[Int8Linear]:
        """Make one module for each of `weights`, a share group: all multiply the same tensor.

        The weights are INT8, symmetric per channel, `biases` float ``[out_features]`` or None. `activation` is the
        static quantization of the input; None quantizes every token to its own range. `dtype` is the dtype that
        `weight` reports. Raises ValueError for tensors that do not fit each other.
        """
        if len(biases) != len(weights):
            raise ValueError(f"biases: expected one for each of {len(weights)} weights, got {len(biases)}")
        group = ShareGroup(list(weights), list(biases), [QuantizedInput(activation)] * len(weights))
        return [cls(group, i, bias is not None, dtype) for i, bias in enumerate(biases)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.share_group.output(self.member, x)
        return _Differentiable.apply(x, result, self) if needs_function(x) else result

    @property
    def activation(self) -> StaticActivation | None:
        """Static quantization of the input; None means per token."""
        return self.share_group.inputs[self.member].activation

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of this module's part of its group's tensors."""
        return self.share_group.nbytes(self.member)

    def quantized_weight(self) -> QuantizedWeight:
        """The plain form of the weight, in new tensors; it multiplies the smoothed input."""
        return ops.unpack_int8(self.share_group.packed.member(self.member))[0]

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Dequantized weight times smoothing factor, ``[out_features, in_features]``: it multiplies the plain input."""
        return ops.int8_dequantize(self.share_group.packed, self.member, self._smoothing_factor, dtype)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Weight, bias and input parameters in new tensors, since files may not hold one tensor under two names."""
        qw, bias = self.quantized_weight(), self._float_bias()
        tensors = self.share_group.inputs[self.member].plain_tensors() | ({} if bias is None else {"bias": bias})
        return {"codes": qw.codes, "scales": qw.scales} | {name: tensor.clone() for name, tensor in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """How the input is quantized, and whether there is a bias."""
        return {
            "activation": ACTIVATIONS[self.activation is None],
            "smoothed": self._smoothing_factor is not None,
            "bias": self._has_bias,
        }

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder for the linear layer `module`; ValueError for an invalid `entry`."""
        if entry["activation"] not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {entry['activation']!r}")
        static, smoothed = entry["activation"] == "static", flag(entry, "smoothed")
        if smoothed and not static:
            raise ValueError("smoothed: expected false where the input is quantized per token, got true")
        rows, columns = linear_shape(module)
        tensors = {
            "codes": (torch.int8, (rows, columns)),
            "scales": (torch.float32, (rows, 1)),
            "smoothing_factor": (torch.float32, (columns,)) if smoothed else None,
            "input_scale": (torch.float32, (1,)) if static else None,
            "input_zero_point": (torch.int32, (1,)) if static else None,
            "bias": (torch.float32, (rows,)) if flag(entry, "bias") else None,
        }
        return Placeholder((rows, columns), entry, tensors)

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[Int8Linear]:
        """Make the modules of one share group; ValueError or TypeError for tensors that do not fit each other."""
        tensors = [place.tensors for place in loaded]
        activations = [read_activation(each) for each in tensors]
        if not all(same_activation(activation, activations[0]) for activation in activations):
            raise ValueError("input_scale, input_zero_point, smoothing_factor: expected the same in a share group")
        weights = [_weight(each, place.shape) for each, place in zip(tensors, loaded, strict=True)]
        return cls.make_group(weights, [each["bias"] for each in tensors], activations[0], torch.float32)

    def extra_repr(self) -> str:
        fields = {"in_features": self.in_features, "out_features": self.out_features, **self.describe()}
        fields["group"] = len(self.share_group.inputs)
        return ", ".join(f"{name}={value}" for name, value in fields.items())

    def _float_bias(self) -> torch.Tensor | None:
        return self.share_group.bias_of(self.member) if self._has_bias else None

    @property
    def _smoothing_factor(self) -> torch.Tensor | None:
        return None if self.activation is None else self.activation.smoothing_factor

    def _traced_weight(self) -> torch.Tensor:
        return self.dequantized_weight(self._float.dtype)

    def _set_values(self, weight: torch.Tensor) -> None:
        factor = self._smoothing_factor
        qw = quantize_per_channel(weight if factor is None else weight / factor)
        self.share_group.replace(self.member, qw, self.activation)

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        activation = None if self.activation is None else read_activation(tensors)
        self.share_group.replace(self.member, _weight(tensors, self.weight_shape), activation)

    def _set_bias(self, bias: torch.Tensor) -> None:
        self.share_group.set_bias(self.member, bias)


class _Differentiable(torch.autograd.Function):
    """The straight-through gradient, which ignores the rounding of the input (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, x, result, module):
        ctx.dtype = x.dtype
        # The weight itself, since the module may get another one before `backward`.
        ctx.weight = module.share_group.packed, module.member, module._smoothing_factor
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        return (grad @ ops.int8_dequantize(*ctx.weight, grad.dtype)).to(ctx.dtype), None, None


class QuantizedInput:
    """Quantizes the input of a share group, and holds the tensors that this needs."""

    def __init__(self, activation: StaticActivation | None) -> None:
        self.activation = activation
        if activation is not None:
            self.multiplier = activation.multiplier
            self.scale = torch.tensor([activation.scale], dtype=torch.float32)
            self.zero_point = torch.tensor([activation.zero_point], dtype=torch.int32)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes, uint8 ``[..., K]``, scales and zero points, both ``[1]`` or ``[M]``."""
        if self.activation is None:
            return ops.quantize_activation_per_token(x)
        return ops.quantize_activation(x, self.multiplier, self.activation.zero_point), self.scale, self.zero_point

    def joined(self, in_features: int) -> torch.Tensor | None:
        """Scale, zero point and the multiplier of every feature, float32 ``[2 + K]``; None if it is per token."""
        if self.activation is None:
            return None
        return torch.cat((self.scale, self.zero_point.float(), self.multiplier.expand(in_features)))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return (
            0 if self.activation is None else sum(t.nbytes for t in (self.multiplier, *self.plain_tensors().values()))
        )

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a state dict holds, by name."""
        if self.activation is None:
            return {}
        tensors = {"input_scale": self.scale, "input_zero_point": self.zero_point}
        factor = self.activation.smoothing_factor
        return tensors if factor is None else {"smoothing_factor": factor} | tensors


class _Pending(NamedTuple):
    """Results for `x` that the first module of a share group computed for all; None where they were taken.

    Only `thread` may take them, so that none is taken twice. `before` tells whether `x` has changed since: its version
    at the time, or a copy of an inference tensor.
    """

    x: torch.Tensor
    thread: int | None
    before: int | torch.Tensor
    outputs: tuple[torch.Tensor | None, ...]


class ShareGroup:
    """The packed weights and biases of a share group, and results that its members have not taken yet.

    `inputs` has one entry per member. All are the same object unless members were loaded with different activations;
    then each computes alone. `packed` and `bias` are replaced, never written to, so that other threads can read on.
    `tensors` has a dict per member, which stays the same: its weight, bias and static input alone, for ops of layers.
    """

    def __init__(
        self, weights: list[QuantizedWeight], biases: list[torch.Tensor | None], inputs: list[QuantizedInput]
    ) -> None:
        self.packed = ops.pack_int8(weights)
        self.inputs = inputs
        self.bias: torch.Tensor | None = None
        self.tensors: list[dict[str, torch.Tensor | None]] = [{} for _ in weights]
        self._pending: _Pending | None = None  # one immutable object, so that threads see all of it or nothing
        for each in inputs:
            _check_smoothing(each.activation, self.packed.in_features)
        for member, bias in enumerate(biases):
            if bias is not None:
                self.set_bias(member, bias)
        self._set_tensors()

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return the result of one member for `x`."""
        if len(self.inputs) == 1:
            return self._multiply(self.inputs[0], x, self.packed, self.bias)[0]
        if not self.has_one_input() or _strict_export():
            return self._alone(member, x)
        pending, thread = self._pending, _thread()
        outputs = None
        if pending is not None and pending.x is x and pending.thread == thread and _is_as_before(x, pending.before):
            before, outputs = pending.before, pending.outputs
        if outputs is None or outputs[member] is None or outputs[member].dtype != autocast_dtype(x):
            if member != 0:
                return self._alone(member, x)
            before, outputs = _state(x), self._multiply(self.inputs[0], x, self.packed, self.bias)
        left = tuple(None if i == member else output for i, output in enumerate(outputs))
        self._pending = None if all(output is None for output in left) else _Pending(x, thread, before, left)
        return outputs[member]

    def has_one_input(self) -> bool:
        """Whether all members quantize their input alike; loading a state dict can change that."""
        first = self.inputs[0]
        return all(each is first for each in self.inputs)

    def multiply(
        self, x: torch.Tensor, post_op: PostOp = PostOp.NONE, others: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """``post_op(x @ weight.T + bias, others)`` of every member; all must quantize `x` alike. Has no gradient."""
        return ops.int8_linear(*self.inputs[0].quantize(x), self.packed, self.bias, x.dtype, post_op, others)

    def multiply_gated(self, x: torch.Tensor, activation: PostOp) -> torch.Tensor:
        """``activation(gate) * up``, where gate and up are the results of two members."""
        return ops.int8_linear_gated(*self.inputs[0].quantize(x), self.packed, self.bias, x.dtype, activation)

    def bias_of(self, member: int) -> torch.Tensor | None:
        """A view of the bias of one member; None when no member has one."""
        return None if self.bias is None else self.bias.split(self.packed.out_features)[member]

    def set_bias(self, member: int, bias: torch.Tensor) -> None:
        """Replace the bias of one member; ValueError when its shape is not ``[out_features]``."""
        counts = self.packed.out_features
        joined = torch.zeros(sum(counts), dtype=torch.float32) if self.bias is None else self.bias.clone()
        joined.split(counts)[member].copy_(check_bias(bias, counts[member]))
        self.bias = joined
        self._set_tensors()
        self._pending = None

    def replace(self, member: int, weight: QuantizedWeight, activation: StaticActivation | None) -> None:
        """Replace the weight and activation of one member; ValueError when they do not fit."""
        _check_smoothing(activation, self.packed.in_features)
        weights = ops.unpack_int8(self.packed)
        weights[member] = weight
        self.packed = ops.pack_int8(weights)
        same = [each for each in self.inputs if same_activation(each.activation, activation)]
        self.inputs[member] = same[0] if same else QuantizedInput(activation)
        self._set_tensors()
        self._pending = None

    def nbytes(self, member: int) -> int:
        """Bytes of one member's part; the parts of all members add up to the group's tensors."""
        inputs = {id(each): each.nbytes for each in self.inputs}
        joined = {id(each): each.nbytes for tensors in self.tensors if (each := tensors["_static_input"]) is not None}
        held = self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)
        total = held + sum(inputs.values()) + sum(joined.values())
        counts = self.packed.out_features
        before, rows = sum(counts[:member]), max(sum(counts), 1)
        return total * (before + counts[member]) // rows - total * before // rows

    def _set_tensors(self) -> None:
        static = {id(each): each.joined(self.packed.in_features) for each in self.inputs}
        for member, tensors in enumerate(self.tensors):
            tensors["_packed"] = self.packed.member(member).data
            tensors["_bias"] = self.bias_of(member)
            tensors["_static_input"] = static[id(self.inputs[member])]

    def _alone(self, member: int, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(self.inputs[member], x, self.packed.member(member), self.bias_of(member))[0]

    def _multiply(
        self, quantized_input: QuantizedInput, x: torch.Tensor, packed: ops.PackedInt8, bias: torch.Tensor | None
    ) -> list[torch.Tensor]:
        x = autocast(x).detach()
        return ops.int8_linear(*quantized_input.quantize(x), packed, bias, x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Pickles may be read by another machine or version, so they hold plain weights, and no pending results.
        return {"weights": ops.unpack_int8(self.packed), "inputs": self.inputs, "bias": self.bias}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.packed = ops.pack_int8(state["weights"])
        self.inputs, self.bias, self._pending = state["inputs"], state["bias"], None
        self.tensors = [{} for _ in self.inputs]
        self._set_tensors()

    def process_state(self) -> dict[str, Any]:
        """State for another process of this machine, which shares the memory of the tensors."""
        return {**self.__dict__, "_pending": None}


share_with_processes(ShareGroup)


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()


def _strict_export() -> bool:
    # Strict export cannot trace `_version`.
    return torch.compiler.is_dynamo_compiling() and _is_exporting()


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # Dynamo of torch 2.10 would evaluate is_exporting() itself, to True under torch.compile too.
    return torch.compiler.is_exporting()


def _state(x: torch.Tensor) -> int | torch.Tensor:
    # Inference tensors have no version, and Dynamo cannot trace `is_inference`.
    return x._version if torch.compiler.is_compiling() or not x.is_inference() else x.clone()


def _is_as_before(x: torch.Tensor, before: int | torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        # A graph holds only one of both ways, so that a model that writes to a shared input does not compile.
        message = "Int8Linear: the input of a share group changed between its members' calls"
        torch._check(before == x._version, lambda: message)
        return True
    if isinstance(before, torch.Tensor):
        return x.shape == before.shape and x.dtype == before.dtype and torch.equal(x, before)
    return before == x._version


def _weight(tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> QuantizedWeight:
    return QuantizedWeight(tensors["codes"], tensors["scales"], None, None, INT8_PER_CHANNEL, tuple(shape))


def _check_smoothing(activation: StaticActivation | None, in_features: int) -> None:
    factor = None if activation is None else activation.smoothing_factor
    if factor is not None and factor.shape != (in_features,):
        raise ValueError(f"smoothing_factor: expected shape [{in_features}], got {list(factor.shape)}")
