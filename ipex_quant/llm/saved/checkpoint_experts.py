"""Experts that a low-precision checkpoint holds one by one, for models that stack them in 3-D parameters."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ...checkpoints import Checkpoint, Joined, Stored, WeightsInMemory
from ...nn import WeightOnlyQuantizedExperts
from ...nn.linears import holds_experts
from ...nn.stacked_experts import expert_layout, experts_obstacle, experts_shape
from ...numerics.quantized_stack import QuantizedStack
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL, QConfigWoq, WeightScheme
from ...woq.rtn import rtn

PARTS = {"gate_up": ("gate", "up"), "up": ("up",), "down": ("down",)}
"""The parts of one projection in checkpoints; experts without a gate have `up` alone."""

Named = tuple[QuantizedWeight, torch.Tensor | None]
"""Weight and bias of a linear layer."""

_EXPERT = re.compile(r"^(?P<module>.+)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj$")


def module_of(name: str) -> str:
    """Name of the module whose expert has the linear layer `name`; `name` itself if it is no part of an expert."""
    found = _EXPERT.match(name)
    return found["module"] if found else name


def experts_from_checkpoint(
    checkpoint: Checkpoint | WeightsInMemory, name: str, qconfig: QConfigWoq, module: nn.Module
) -> WeightOnlyQuantizedExperts:
    """The quantized successor of `module`, the experts called `name`, with the weights in `checkpoint`.

    All experts must have one scheme, and gate and up of one expert the same order of input features. Weights that the
    checkpoint has in float are rounded to nearest in that scheme, with a warning. A module without biases in the
    checkpoint keeps its own. Raises ValueError if the checkpoint lacks a part of an expert.
    """
    experts, hidden, width = experts_shape(module)
    projections = _projections(module)
    sizes = {"gate": width, "up": width, "down": hidden}
    shapes = expert_shapes(name, module)
    found = _with_one_group_size(
        {each: checkpoint.quantized_weight(each, shape[1], shape[0]) for each, shape in shapes.items()}
    )
    if any(checkpoint.input_factor(each, shape[1]) is not None for each, shape in shapes.items()):
        raise ValueError(f"{name}: factors of the input of single experts are not supported")
    scheme = next(each[0].scheme for each in found.values() if each is not None)
    rounded = [each for each, weight in found.items() if weight is None]
    found |= {each: _rounded(checkpoint, each, shapes[each], scheme) for each in rounded}
    if rounded:
        warnings.warn(
            f"low_precision_checkpoint: it holds {len(rounded)} parts of the experts {name} in float, which are "
            f"rounded to nearest as {scheme}: {', '.join(rounded[:6])}{', ...' * (len(rounded) > 6)}",
            stacklevel=2,
        )
    stacks, biases = [], []
    for parts in projections:
        alternating = len(parts) == 2 and checkpoint.halves and not expert_layout(module).concatenated
        rows = [[found[f"{name}.{expert}.{part}_proj"] for part in parts] for expert in range(experts)]
        try:
            weights = [_above_each_other([weight for weight, _ in row]) for row in rows]
            stacks.append(QuantizedStack.of([_separated(weight) for weight in weights] if alternating else weights))
        except ValueError as error:
            raise ValueError(f"{name}: {'_'.join(parts)}: {error}") from error
        bias = _stacked_biases([[bias for _, bias in row] for row in rows], [sizes[part] for part in parts])
        biases.append(bias[:, _gate_then_up(bias.shape[1])] if alternating and bias is not None else bias)
    return WeightOnlyQuantizedExperts.in_place_of(module, tuple(stacks), qconfig, tuple(biases))


def expert_shapes(name: str, module: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes ``(out_features, in_features)`` of the linear layers of every expert of `module`, called `name`."""
    experts, hidden, width = experts_shape(module)
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    parts = [part for projection in _projections(module) for part in projection]
    return {f"{name}.{expert}.{part}_proj": sizes[part] for expert in range(experts) for part in parts}


def _projections(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return PARTS["gate_up" if expert_layout(module).gated else "up"], PARTS["down"]


def _with_one_group_size(found: Mapping[str, Named | None]) -> dict[str, Named | None]:
    """The weights and biases `found`, where one group that holds all input features has the size of the other groups.

    Formats read such a group as one scale per channel.
    """
    size = max((each[0].scheme.group_size for each in found.values() if each is not None), default=PER_CHANNEL)
    alike: dict[str, Named | None] = {}
    for name, each in found.items():
        if each is not None and each[0].scheme.group_size == PER_CHANNEL and each[0].shape[1] <= size:
            scheme = dataclasses.replace(each[0].scheme, group_size=size)
            each = dataclasses.replace(each[0], scheme=scheme), each[1]
        alike[name] = each
    return alike


def stack_float_experts(model: nn.Module, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """`tensors` by name, with those of single experts stacked as in `model`, where it has them in float.

    Stacks are read when they are needed. Raises ValueError for a part of an expert that is missing, one too many, or
    of another shape than the model's.
    """
    result: dict[str, Stored] = {}
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    quantized = {name for name, module in model.named_modules() if isinstance(module, WeightOnlyQuantizedExperts)}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        found = _EXPERT.match(owner) if key in ("weight", "bias") else None
        if found and found["module"] in quantized:
            continue  # the quantized experts have it
        if found and _has_known_layout(model, found["module"]):
            parts[found["module"]][name] = tensor
        else:
            result[name] = tensor
    for name, own in parts.items():
        result |= _stacks(name, model.get_submodule(name), own)
    return result


def _stacks(name: str, module: nn.Module, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The parameters of `module`, which holds the experts `name`, made of the `tensors` of single ones."""
    layout, shapes = expert_layout(module), expert_shapes(name, module)
    biased = any(each.endswith(".bias") for each in tensors)
    result: dict[str, Stored] = {}
    for projection, parts in zip(("gate_up", "down"), _projections(module), strict=True):
        for key in ("weight", "bias")[: 1 + biased]:
            sources = [
                [_part(tensors, f"{name}.{expert}.{part}_proj", key, shapes) for part in parts]
                for expert in range(experts_shape(module)[0])
            ]
            make = partial(
                _in_one,
                alternating=len(parts) == 2 and not layout.concatenated,
                transposed=layout.transposed and key == "weight",
            )
            entry = make([torch.empty(each.shape, dtype=each.dtype, device="meta") for each in sources[0]])
            parameter = f"{name}.{layout.parameter(projection)}{'_bias' if key == 'bias' else ''}"
            result[parameter] = Joined(sources, torch.Size((len(sources), *entry.shape)), entry.dtype, make)
    if tensors:
        raise ValueError(f"{name}: expected {len(sources)} experts, got also {min(tensors)}")
    return result


def _part(tensors: dict[str, Stored], layer: str, key: str, shapes: Mapping[str, tuple[int, int]]) -> Stored:
    """A tensor of one expert, taken out of `tensors`."""
    shape = shapes[layer] if key == "weight" else shapes[layer][:1]
    stored = tensors.pop(f"{layer}.{key}", None)
    if stored is None:
        raise ValueError(f"{layer}.{key}: missing, the checkpoint has other experts; get a complete one")
    if tuple(stored.shape) != shape:
        raise ValueError(f"{layer}.{key}: expected shape {list(shape)}, the checkpoint has {list(stored.shape)}")
    return stored


def _in_one(parts: list[torch.Tensor], alternating: bool, transposed: bool) -> torch.Tensor:
    """Gate and up, or down alone, as a module has them for one expert."""
    whole = torch.stack(parts, dim=1).flatten(0, 1) if alternating else torch.cat(parts)
    return whole.t() if transposed else whole


def _has_known_layout(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return holds_experts(module) and experts_obstacle(module) is None


def _rounded(
    checkpoint: Checkpoint | WeightsInMemory, name: str, shape: tuple[int, int], scheme: WeightScheme
) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """Rounded weight and bias of a part that `checkpoint` has in float; ValueError if missing or of another shape."""
    stored = checkpoint.tensors.get(f"{name}.weight")
    if stored is None:
        raise ValueError(f"{name}: missing in the checkpoint, which holds other experts of its module quantized")
    weight = stored[...]
    if tuple(weight.shape) != shape or not weight.is_floating_point():
        raise ValueError(f"{name}.weight: expected floats {list(shape)}, got {weight.dtype} {list(weight.shape)}")
    stored_bias = checkpoint.tensors.get(f"{name}.bias")
    bias = None if stored_bias is None else stored_bias[...]
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(f"{name}.bias: expected shape [{shape[0]}], got {list(bias.shape)}")
    return rtn(weight, scheme), bias


def _above_each_other(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight with the rows of all `weights`; ValueError unless their scheme and input order are the same."""
    first, *others = weights
    if not others:
        return first
    together = QuantizedStack.of([first, *others])
    if together.g_idx is not None and not (together.g_idx == together.g_idx[0]).all():
        raise ValueError("g_idx: expected the same for gate and up of an expert, which have one input")
    tensors = {name: tensor.flatten(0, 1) for name, tensor in together.tensors().items() if name != "g_idx"}
    shape = (len(weights) * first.shape[0], first.shape[1])
    return dataclasses.replace(first, **tensors, shape=shape)


def _separated(weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` of an expert, in which rows of gate and up alternate, with those of gate first."""
    return weight.select(_gate_then_up(weight.shape[0]))


def _gate_then_up(rows: int) -> torch.Tensor:
    return torch.cat((torch.arange(0, rows, 2), torch.arange(1, rows, 2)))


def _stacked_biases(biases: list[list[torch.Tensor | None]], sizes: list[int]) -> torch.Tensor | None:
    """Float32 ``[E, sum of sizes]``, zeros for parts without a bias; None when all are."""
    given = [bias for row in biases for bias in row if bias is not None]
    if not any(bias.any() for bias in given):
        return None
    rows = [
        torch.cat(
            [
                torch.zeros(n, dtype=torch.float32) if bias is None else bias.float()
                for bias, n in zip(row, sizes, strict=True)
            ]
        )
        for row in biases
    ]
    return torch.stack(rows)
