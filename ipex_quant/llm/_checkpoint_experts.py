"""Experts that a low-precision checkpoint holds one by one, for models that stack them in 3-D parameters."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..checkpoints import Checkpoint
from ..nn import WeightOnlyQuantizedExperts
from ..nn.linears import holds_experts
from ..nn.stacked_experts import experts_obstacle, experts_shape
from ..numerics.quantized_stack import QuantizedStack
from ..numerics.quantized_weight import QuantizedWeight
from ..quantization._qconfig import QConfigWoq

_PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}
"""What one projection of a module is in checkpoints."""

_EXPERT = re.compile(r"^(?P<module>.+)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj$")


def with_model_names(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the names that `model` has for its tensors, as transformers itself would rename them.

    The parts of one expert become ``<module>.<index>.gate_proj``, ``up_proj`` and ``down_proj``, where `module` holds
    the experts. Models without experts have the names of their checkpoints. Raises ValueError for two tensors that get
    one name.
    """
    if not isinstance(model, PreTrainedModel) or not any(map(holds_experts, model.modules())):
        return checkpoint
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        owner, _, key = name.rpartition(".")
        new = f"{_model_name(owner, renamings, converters)}.{key}" if owner else name
        if new in tensors:
            raise ValueError(f"low_precision_checkpoint: {name} is a second tensor for {new}")
        tensors[new] = tensor
    return dataclasses.replace(checkpoint, tensors=tensors)


def _model_name(owner: str, renamings: list[WeightRenaming], converters: list[WeightConverter]) -> str:
    source = f"{owner}.weight"
    renamed, pattern = rename_source_key(source, renamings, converters)
    if pattern is None:
        return renamed.removesuffix(".weight") if renamed.endswith(".weight") else owner
    sources = next(list(each.source_patterns) for each in converters if pattern in each.source_patterns)
    index = re.search(r"\.(\d+)\.[^.]+\.weight$", source)
    for projection, parts in _PARTS.items():
        if index and renamed.endswith(f".{projection}_proj") and len(sources) == len(parts):
            part = parts[sources.index(pattern)]
            return f"{renamed.removesuffix(f'.{projection}_proj')}.{index[1]}.{part}_proj"
    return owner


def module_of(name: str) -> str:
    """The module that holds the expert which the linear layer `name` is a part of; `name` itself for any other."""
    found = _EXPERT.match(name)
    return found["module"] if found else name


def experts_from_checkpoint(
    checkpoint: Checkpoint, name: str, qconfig: QConfigWoq, module: nn.Module
) -> WeightOnlyQuantizedExperts:
    """What takes the place of `module`, the experts called `name`; ValueError if a part of one is not in `checkpoint`.

    All experts have one scheme, and gate and up of one expert the same order of input features. A module without
    biases in the checkpoint keeps its own.
    """
    experts, hidden, width = experts_shape(module)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    stacks, biases = [], []
    for projection, parts in _PARTS.items():
        names = [[f"{name}.{expert}.{part}_proj" for part in parts] for expert in range(experts)]
        found = [
            [_read(checkpoint, each, shapes[part]) for each, part in zip(row, parts, strict=True)] for row in names
        ]
        try:
            stacks.append(QuantizedStack.of([_above_each_other([weight for weight, _ in row]) for row in found]))
        except ValueError as error:
            raise ValueError(f"{name}: {projection}: {error}") from error
        biases.append(
            _stacked_biases([[bias for _, bias in row] for row in found], [shapes[part][0] for part in parts])
        )
    return WeightOnlyQuantizedExperts.in_place_of(module, tuple(stacks), qconfig, tuple(biases))


def stack_float_experts(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` by name, where the float weights of experts that `model` has in float are stacked as it does.

    Raises ValueError for a weight that is missing or has another shape than the others.
    """
    result, parts = {}, defaultdict(dict)
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        found = _EXPERT.match(owner)
        if found and key == "weight" and _is_stacked_plainly(model, found["module"]):
            parts[found["module"]][found["part"], int(found["index"])] = tensor
        else:
            result[name] = tensor
    for name, own in parts.items():
        count = model.get_submodule(name).num_experts
        expected = {(part, expert) for part in ("gate", "up", "down") for expert in range(count)}
        if own.keys() != expected:
            raise ValueError(f"{name}: expected the weights of {count} experts, not of {sorted(own.keys() ^ expected)}")
        for projection, names in _PARTS.items():
            rows = [torch.cat([own[part, expert] for part in names]) for expert in range(count)]
            result[f"{name}.{projection}_proj"] = torch.stack(rows)
    return result


def _is_stacked_plainly(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    plain = holds_experts(module) and experts_obstacle(module) is None
    return plain and module.is_concatenated and not module.is_transposed


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> tuple[QuantizedWeight, torch.Tensor | None]:
    found = checkpoint.quantized_weight(name, shape[1], shape[0])
    if found is None:
        raise ValueError(f"{name}: missing in the checkpoint, which holds other experts of its module quantized")
    return found


def _above_each_other(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight with the rows of all; ValueError unless they have one scheme and order of input features."""
    first, *others = weights
    if not others:
        return first
    together = QuantizedStack.of([first, *others])
    if together.g_idx is not None and not (together.g_idx == together.g_idx[0]).all():
        raise ValueError("g_idx: expected the same for gate and up of an expert, which have one input")
    tensors = {name: tensor.flatten(0, 1) for name, tensor in together.tensors().items() if name != "g_idx"}
    shape = (len(weights) * first.shape[0], first.shape[1])
    return dataclasses.replace(first, **tensors, shape=shape)


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
