"""`Int8Recurrent` and `Int8RecurrentCell`: LSTMs, GRUs and plain recurrent networks in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..numerics import affine
from ..numerics.int8 import channel_scales, quantize_per_channel
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES
from ..ops.int8 import INT8_PER_CHANNEL
from .int8_linear import QuantizedInput, ShareGroup
from .quantized_module import Placeholder, QuantizedModule, autocast_dtype
from .recurrent import grouped_names, is_recurrent, named_biases, recurrent_obstacle

State = tuple[torch.Tensor, ...]
"""Hidden state, and for an LSTM cell state, float32 ``[N, size]``."""


class _Int8Weights(QuantizedModule):
    """Base of layers and cells: INT8 weights with one scale per output channel.

    The state dict holds plain tensors: for each weight of torch's module, such as ``weight_ih_l0``, `codes_ih_l0` int8
    and `scales_ih_l0` float32 ``[rows, 1]``, and for each bias `bias_ih_l0` float32. Dropout between layers is not
    applied. `weight` is all weights, flattened and concatenated.
    """

    entry_names = frozenset()
    activation = None
    """Every row of inputs and hidden states is quantized to its own range."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.input_size, self.hidden_size = module.input_size, module.hidden_size
        self.mode = _mode(module)
        self._names = grouped_names(module)
        self._shapes = {name: tuple(getattr(module, f"weight_{name}").shape) for names in self._names for name in names}
        self._biased = frozenset(named_biases(module))
        self._groups: dict[str, ShareGroup] = {}

    @classmethod
    def from_float(
        cls, module: nn.Module, find_scales: Callable[[torch.Tensor], torch.Tensor] = channel_scales
    ) -> _Int8Weights:
        """Quantize the weights of `module`, each with the scales, float32 ``[rows]``, that `find_scales` gives for it.

        Raises ValueError for a module of another kind or one that overrides forward, and for NaN or Inf.
        """
        _check(cls, module)
        made, tensors = cls(module), {}
        for name in made._shapes:
            weight = getattr(module, f"weight_{name}").detach().float()
            qw = quantize_per_channel(weight, find_scales(weight))
            tensors |= {f"codes_{name}": qw.codes, f"scales_{name}": qw.scales}
        tensors |= {f"bias_{name}": bias.detach().float() for name, bias in named_biases(module).items()}
        made._load_weight(tensors)
        return made.to(next(module.parameters()).dtype).train(module.training)

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(self._kinds())

    @property
    def weight_shape(self) -> tuple[int]:
        """Number of values of all weights."""
        return (sum(rows * columns for rows, columns in self._shapes.values()),)

    @property
    def bias(self) -> bool:
        """Whether there are biases, as in torch's modules."""
        return bool(self._biased)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases."""
        return sum(group.nbytes(i) for group in self._groups.values() for i in range(len(group.inputs)))

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Weights and biases as the state dict has them, in new tensors."""
        tensors = {}
        for names in self._names:
            group = self._groups[names[0]]
            for member, (name, qw) in enumerate(zip(names, ops.unpack_int8(group.packed), strict=True)):
                tensors |= {f"codes_{name}": qw.codes.clone(), f"scales_{name}": qw.scales.clone()}
                if name in self._biased:
                    tensors[f"bias_{name}"] = group.bias_of(member).clone()
        return tensors

    def dequantized_parameters(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Dequantized weights and biases by their names in torch's module, in new tensors."""
        plain = self.plain_tensors()
        weights = {
            f"weight_{name}": affine.dequantize(_weight(plain, name, shape), dtype)
            for name, shape in self._shapes.items()
        }
        return weights | {f"bias_{name}": plain[f"bias_{name}"].to(dtype) for name in sorted(self._biased)}

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The real values of all weights, flattened and concatenated."""
        values = self.dequantized_parameters(dtype)
        return torch.cat([values[f"weight_{name}"].flatten() for name in self._shapes])

    def describe(self) -> dict[str, Any]:
        """An empty dict: the float module tells everything."""
        return {}

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder for the recurrent `module`; ValueError for a module of another kind."""
        _check(cls, module)
        made = cls(module)
        place = Placeholder(made.weight_shape, entry, made._kinds())
        vars(place)["made"] = made  # not as a child, whose tensors would be loaded
        return place

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[_Int8Weights]:
        """Make one module of each placeholder; ValueError or TypeError for tensors that do not fit."""
        for place in loaded:
            place.made._load_weight(place.tensors)
        return [place.made for place in loaded]

    def _kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every plain tensor."""
        kinds = {}
        for name, (rows, columns) in self._shapes.items():
            kinds[f"codes_{name}"] = torch.int8, (rows, columns)
            kinds[f"scales_{name}"] = torch.float32, (rows, 1)
            if name in self._biased:
                kinds[f"bias_{name}"] = torch.float32, (rows,)
        return kinds

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, (dtype, shape) in self._kinds().items():
            if tensors[name].dtype != dtype:
                raise TypeError(f"{name}: expected dtype {dtype}, got {tensors[name].dtype}")
            if tensors[name].shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensors[name].shape)}")
        groups = {}
        for names in self._names:
            weights = [_weight(tensors, name, self._shapes[name]) for name in names]
            biases = [tensors[f"bias_{name}"] if name in self._biased else None for name in names]
            groups[names[0]] = ShareGroup(weights, biases, [QuantizedInput(None)] * len(names))
        self._groups = groups

    def _multiply(self, name: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Multiply float32 `x` by the weights of group `name` and add biases; one float32 result per weight."""
        group = self._groups[name]
        return ops.int8_linear(*ops.quantize_activation_per_token(x), group.packed, group.bias, torch.float32)

    def _step(self, inputs: torch.Tensor, state: State, end: str) -> State:
        """Next state from the input times its weight and the current state; `end` is the weights' suffix."""
        hidden = self._multiply(f"hh{end}", state[0])[0]
        new = _STEPS[self.mode](inputs, hidden, state)
        return (self._multiply(f"hr{end}", new[0])[0], *new[1:]) if f"hr{end}" in self._groups else new

    def _check_input(self, x: torch.Tensor, dims: tuple[int, ...]) -> None:
        if x.dtype not in FLOAT_DTYPES:
            raise RuntimeError(f"input: expected float32, bfloat16 or float16, got {x.dtype}")
        if x.dim() not in dims or x.shape[-1] != self.input_size:
            raise RuntimeError(f"input: expected {dims} dimensions, the last of {self.input_size}, got {list(x.shape)}")

    def _state(self, hx: Any, shapes: Sequence[tuple[int, ...]]) -> State:
        """The given state in float32, zeros for None; RuntimeError unless its tensors have `shapes`."""
        if hx is None:
            return tuple(torch.zeros(shape) for shape in shapes)
        tensors = tuple(hx) if self.mode == "LSTM" else (hx,)
        if len(tensors) != len(shapes) or any(t.shape != s for t, s in zip(tensors, shapes, strict=True)):
            got = [list(tensor.shape) for tensor in tensors]
            raise RuntimeError(f"hx: expected shapes {[list(shape) for shape in shapes]}, got {got}")
        return tuple(tensor.detach().float() for tensor in tensors)


class Int8Recurrent(_Int8Weights):
    """An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` whose weights, inputs and hidden states are quantized to 8 bits.

    It is called like torch's module: with float32, bfloat16 or float16 tensors on the CPU, padded, packed or of one
    sequence. It has no gradient. Gates and states are float32 within a call; results have the dtype of the input, or
    autocast's under torch.autocast. Weights have one scale per output channel; every row of an input or hidden state is
    quantized to its own range. `from_float` makes a module.
    """

    kind = "int8_recurrent"

    def __init__(self, module: nn.LSTM | nn.GRU | nn.RNN) -> None:
        super().__init__(module)
        self.num_layers, self.bidirectional, self.batch_first = (
            module.num_layers,
            module.bidirectional,
            module.batch_first,
        )
        self.proj_size, self.dropout = module.proj_size, 0.0

    def flatten_parameters(self) -> None:
        """Do nothing; model code calls this for GPUs."""

    def forward(self, input: torch.Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        self._check_input(input, (2, 3))
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            if hx is not None:
                hx = tuple(h.unsqueeze(1) for h in hx) if self.mode == "LSTM" else hx.unsqueeze(1)
        steps = input.transpose(0, 1) if self.batch_first else input
        length, batch = steps.shape[:2]
        if length == 0:
            raise RuntimeError("input: expected one time step or more, got none")
        state = self._state(hx, self._state_shapes(batch))
        output, state = self._layers(steps.flatten(0, 1), [batch] * length, state)
        output = output.unflatten(0, (length, batch))
        output = output.transpose(0, 1) if self.batch_first else output
        if not batched:
            output, state = output.squeeze(batch_dim), tuple(s.squeeze(1) for s in state)
        return output, self._returned(state)

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, sizes, order, back = input
        self._check_input(data, (2,))
        sizes_list = sizes.tolist()
        state = self._state(hx, self._state_shapes(sizes_list[0]))
        if order is not None:
            state = tuple(s.index_select(1, order) for s in state)
        output, state = self._layers(data, sizes_list, state)
        if back is not None:
            state = tuple(s.index_select(1, back) for s in state)
        return PackedSequence(output, sizes, order, back), self._returned(state)

    def _state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        count = self.num_layers * (1 + self.bidirectional)
        widths = [self.proj_size or self.hidden_size] + [self.hidden_size] * (self.mode == "LSTM")
        return [(count, batch, width) for width in widths]

    def _returned(self, state: State) -> State | torch.Tensor:
        return state if self.mode == "LSTM" else state[0]

    def _layers(self, data: torch.Tensor, sizes: list[int], state: State) -> tuple[torch.Tensor, State]:
        """Run all layers over the steps of `data`, which follow one another with ``sizes[t]`` rows each."""
        dtype = autocast_dtype(data)
        ends = ("", "_reverse")[: 1 + self.bidirectional]
        x, finals = data.detach().to(dtype).float(), []
        for layer in range(self.num_layers):
            outputs = []
            products = self._multiply(f"ih_l{layer}", x)  # of all steps and both directions at once
            for end, inputs in zip(ends, products, strict=True):
                start = tuple(s[len(finals)] for s in state)
                output, final = self._scan(inputs.split(sizes), start, f"_l{layer}{end}")
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1)
        return x.to(dtype), tuple(torch.stack(each).to(dtype) for each in zip(*finals, strict=True))

    def _scan(self, inputs: Sequence[torch.Tensor], state: State, end: str) -> tuple[torch.Tensor, State]:
        """Run one direction of one layer; returns outputs in the order of the steps, and each sequence's last state."""
        outputs = []
        steps = inputs[::-1] if end.endswith("_reverse") else inputs
        for step in steps:
            rows = len(step)  # shorter sequences come last: they have ended or, in reverse, not begun
            new = self._step(step, tuple(s[:rows] for s in state), end)
            outputs.append(new[0])
            state = tuple(torch.cat([n, s[rows:]]) for n, s in zip(new, state, strict=True))
        return torch.cat(outputs[::-1] if end.endswith("_reverse") else outputs), state

    def extra_repr(self) -> str:
        names = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, {settings}"


class Int8RecurrentCell(_Int8Weights):
    """An ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell`` in 8 bits, computed as a step of `Int8Recurrent`."""

    kind = "int8_recurrent_cell"

    def forward(self, input: torch.Tensor, hx: Any = None) -> torch.Tensor | State:
        self._check_input(input, (1, 2))
        dtype, rows = autocast_dtype(input), input.shape[:-1]
        state = self._state(hx, [(*rows, self.hidden_size)] * (1 + (self.mode == "LSTM")))
        x = torch.atleast_2d(input.detach().to(dtype).float())
        new = self._step(self._multiply("ih", x)[0], tuple(map(torch.atleast_2d, state)), "")
        new = tuple(n.to(dtype).reshape(*rows, self.hidden_size) for n in new)
        return new if self.mode == "LSTM" else new[0]

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, bias={self.bias}"


def int8_recurrent_class(module: nn.Module) -> type[_Int8Weights]:
    """The quantized class that replaces a recurrent layer or cell."""
    return Int8RecurrentCell if isinstance(module, nn.RNNCellBase) else Int8Recurrent


def _check(cls: type[_Int8Weights], module: nn.Module) -> None:
    if not is_recurrent(module) or int8_recurrent_class(module) is not cls:
        raise ValueError(f"expected a module that an {cls.__name__} can stand for, got a {type(module).__name__}")
    if reason := recurrent_obstacle(module):
        raise ValueError(f"module: cannot be quantized, {reason}")


def _mode(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return module.mode
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"


def _weight(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> QuantizedWeight:
    return QuantizedWeight(tensors[f"codes_{name}"], tensors[f"scales_{name}"], None, None, INT8_PER_CHANNEL, shape)


def _lstm(inputs: torch.Tensor, hidden: torch.Tensor, state: State) -> State:
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(inputs: torch.Tensor, hidden: torch.Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = inputs.chunk(3, -1), hidden.chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + (xz + hz).sigmoid() * (state[0] - n),)


_STEPS = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda inputs, hidden, state: ((inputs + hidden).tanh(),),
    "RNN_RELU": lambda inputs, hidden, state: ((inputs + hidden).relu(),),
}
