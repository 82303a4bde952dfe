"""Weights of checkpoint modules on their way into a layer of vLLM: collected, cut for a rank, joined and packed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.model_executor.utils import set_weight_attrs

from ...checkpoints.tensors import SYMMETRIC_ZERO_POINT
from ...numerics.int8 import StaticActivation, same_activation
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL
from .packed import FloatLinear, JoinedLinears, Modes, PackedInt8Linear, PackedLinear, PackedWoqLinear

Key = str | int | tuple[int, ...] | None
"""Which part of a joined layer a tensor of a checkpoint is, as vLLM calls it; None for all of it."""

_HEADS = {"q": 0, "k": 1, "v": 2}


class Collected:
    """The tensors that a layer takes out of a checkpoint, by part and by name.

    vLLM loads into parameters, so the layer has an empty one for each of `places`; they keep no copy of a tensor.
    """

    def __init__(self, layer: torch.nn.Module, places: dict[str, torch.dtype]) -> None:
        self.tensors: dict[Any, dict[str, torch.Tensor]] = {}
        for name, dtype in places.items():
            place = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(place, {"weight_loader": functools.partial(self.load, name)})
            layer.register_parameter(name, place)
        self._places = tuple(places)

    def load(self, name: str, param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: Key = None) -> None:
        """Keep one tensor: what vLLM calls to load the parameter `name`."""
        key = getattr(loaded_weight, "shard_id", shard_id)
        self.tensors.setdefault(key, {})[name] = loaded_weight.detach()

    def leave(self, layer: torch.nn.Module) -> None:
        """Remove the parameters from `layer`, and forget the tensors."""
        self.tensors.clear()
        for name in self._places:
            delattr(layer, name)


@dataclass(frozen=True)
class WoqWeight:
    """A weight-only quantized weight, and how it is multiplied."""

    weight: QuantizedWeight
    modes: Modes


@dataclass(frozen=True)
class Int8Weight:
    """An INT8 weight for W8A8, and the static quantization of its input, or None."""

    weight: QuantizedWeight
    activation: StaticActivation | None


Weight = WoqWeight | Int8Weight | torch.Tensor
"""The weight of a module, ``[out_features, in_features]``; a tensor for one in float."""


@dataclass(frozen=True)
class Part:
    """The place of one weight of a checkpoint: the parts of the layer's output that it has, in order.

    `sizes` are their output features in the checkpoint, `own_sizes` those of this rank.
    """

    name: str
    sizes: tuple[int, ...]
    own_sizes: tuple[int, ...]


def part_indices(key: Key, count: int) -> tuple[int, ...]:
    """The parts of a layer's output, of `count` in all, that `key` is the name of."""
    if key is None:
        return tuple(range(count))
    if isinstance(key, tuple):
        return key
    return (_HEADS[key],) if isinstance(key, str) else (key,)


def rank_rows(part: Part, rank: int, ranks: int) -> torch.Tensor | slice:
    """The output features of a rank. Parts of which there are fewer than ranks are given to several, in turn."""
    if part.sizes == part.own_sizes:
        return slice(None)
    chosen, begin = [], 0
    for size, own in zip(part.sizes, part.own_sizes, strict=True):
        if size % own or ranks % (size // own):
            raise ValueError(f"{part.name}: {size} output features cannot be divided among {ranks} ranks")
        first = begin + rank // (ranks // (size // own)) * own
        chosen.append(torch.arange(first, first + own))
        begin += size
    return torch.cat(chosen)


def with_rows(weight: Weight, rows: torch.Tensor | slice) -> Weight:
    """`weight` with some of its output features."""
    return weight[rows] if isinstance(weight, torch.Tensor) else replace(weight, weight=weight.weight.select(rows))


def with_columns(weight: Weight, begin: int, end: int) -> Weight:
    """`weight` with the input features from `begin` to `end`; ValueError where these do not hold whole groups."""
    if isinstance(weight, torch.Tensor):
        return weight[:, begin:end]
    cut = _cut_columns(weight.weight, begin, end)
    activation = weight.activation if isinstance(weight, Int8Weight) else None
    if activation is not None and activation.smoothing_factor is not None:
        factor = activation.smoothing_factor[begin:end].clone()
        return Int8Weight(cut, replace(activation, smoothing_factor=factor))
    return replace(weight, weight=cut)


def _cut_columns(weight: QuantizedWeight, begin: int, end: int) -> QuantizedWeight:
    scheme, columns = weight.scheme, weight.shape[1]
    if weight.g_idx is not None:
        raise ValueError(
            "act-order: a rank's input features would have parts of groups; serve it with a tensor parallel size of 1"
        )

    def spans(size: int) -> slice:
        if size == PER_CHANNEL:
            return slice(None)
        if begin % size or (end % size and end != columns):
            raise ValueError(
                f"input features {begin}..{end} of a rank cut groups of {size}; use a smaller tensor parallel size"
            )
        return slice(begin // size, -(-end // size))

    per_byte = 2 if scheme.dtype.bits <= 4 else 1
    cuts: dict[str, slice] = dict.fromkeys(weight.names, spans(scheme.group_size))
    cuts["codes"] = slice(begin // per_byte, -(-end // per_byte))
    if begin % per_byte:
        raise ValueError(f"input features {begin}..{end} of a rank begin within a byte")
    if scheme.super_group_size is not None:
        cuts["super_scales"] = cuts["super_minimums"] = spans(scheme.super_group_size)
    parts: dict[str, Any] = {name: tensor[:, cuts[name]].contiguous() for name, tensor in weight.tensors().items()}
    return replace(weight, **parts, shape=(weight.shape[0], end - begin))


def pack_joined(weights: Sequence[Weight], bias: torch.Tensor | None) -> PackedLinear:
    """The linear layer of all output features of `weights`, with one packed weight wherever neighbours allow."""
    joined = [weights[0]]
    for weight in weights[1:]:
        both = _join(joined[-1], weight)
        joined[-1:] = [joined[-1], weight] if both is None else [both]
    biases = [None] * len(joined) if bias is None else list(bias.split([_rows(weight) for weight in joined]))
    linears = [_pack(*each) for each in zip(joined, biases, strict=True)]
    return linears[0] if len(linears) == 1 else JoinedLinears(linears)


def _pack(weight: Weight, bias: torch.Tensor | None) -> PackedLinear:
    if isinstance(weight, torch.Tensor):
        return FloatLinear(weight, bias)
    if isinstance(weight, Int8Weight):
        return PackedInt8Linear(weight.weight, bias, weight.activation)
    return PackedWoqLinear(weight.weight, bias, weight.modes)


def _rows(weight: Weight) -> int:
    return len(weight) if isinstance(weight, torch.Tensor) else weight.weight.shape[0]


def _join(above: Weight, below: Weight) -> Weight | None:
    """One weight with the rows of both; None if they are quantized differently."""
    if isinstance(above, torch.Tensor) or isinstance(below, torch.Tensor):
        both = isinstance(above, torch.Tensor) and isinstance(below, torch.Tensor)
        return torch.cat((above, below)) if both else None
    if isinstance(above, Int8Weight) and isinstance(below, Int8Weight):
        if not same_activation(above.activation, below.activation):
            return None
        return Int8Weight(joined_rows((above.weight, below.weight)), above.activation)
    if isinstance(above, WoqWeight) and isinstance(below, WoqWeight) and above.modes == below.modes:
        try:
            return WoqWeight(joined_rows((above.weight, below.weight)), above.modes)
        except ValueError:
            return None
    return None


def _with_zero_points(weight: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    """`weight`, with zero points if only `other` has them."""
    if not other.scheme.has_zero_points or not weight.scheme.symmetric or weight.scheme.dtype != other.scheme.dtype:
        return weight
    middle = SYMMETRIC_ZERO_POINT[weight.scheme.dtype]
    zero_points = torch.full(weight.scales.shape, middle, dtype=torch.int16)
    return replace(weight, zero_points=zero_points, scheme=replace(weight.scheme, symmetric=False))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def joined_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight with the rows of all, in order; ValueError unless they are of one scheme and order of groups."""
    joined = weights[0]
    for weight in weights[1:]:
        one, other = _with_zero_points(joined, weight), _with_zero_points(weight, joined)
        if one.scheme != other.scheme or not _same(one.g_idx, other.g_idx):
            raise ValueError(f"expected weights of one scheme and order of groups, got {one.scheme} and {other.scheme}")
        below = other.tensors()
        rows: dict[str, Any] = {
            name: torch.cat((tensor, below[name])) for name, tensor in one.tensors().items() if name != "g_idx"
        }
        joined = replace(one, **rows, shape=(one.shape[0] + other.shape[0], one.shape[1]))
    return joined


Reader = Callable[[str, dict[str, torch.Tensor], int], Weight]
"""Reads the weight of a module out of its tensors: its name, the tensors, and the number of input features."""
