"""`with_model_names`: rename tensors of checkpoints that another release of transformers, or another tool, wrote."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from ...checkpoints import Checkpoint, Stored, WeightsInMemory, split_name
from ...nn.linears import holds_experts
from .checkpoint_experts import PARTS


def with_model_names(model: nn.Module, checkpoint: Checkpoint | WeightsInMemory) -> Checkpoint | WeightsInMemory:
    """`checkpoint` with the names that `model` has for its tensors, as transformers itself would rename them.

    The checkpoint may have names of another release for the same architecture, with or without the prefix of the base
    model. The parts of one expert become ``<module>.<index>.gate_proj``, ``up_proj`` and ``down_proj``, where `module`
    holds the experts. A checkpoint is returned unchanged if `model` has all its quantized layers and no stacked
    experts. Raises ValueError for two tensors that get one name.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(checkpoint, WeightsInMemory):
        return checkpoint
    present = {name for name, _ in model.named_modules()}
    stacked = any(map(holds_experts, model.modules()))
    if not stacked and all(name in present for name in checkpoint):
        return checkpoint
    names = _Names(model, present)
    keys = {*checkpoint.format.keys, checkpoint.format.bias_key, "weight", "bias"}
    tensors: dict[str, Stored] = {}
    stored: dict[str, str] = {}
    for name in sorted(checkpoint.tensors):  # some renamings depend on a name that sorts first
        owner, key = split_name(name, keys)
        new = f"{names.module(owner)}.{key}" if key else names.tensor(name)
        if new in tensors:
            raise ValueError(f"low_precision_checkpoint: {name} is a second tensor for {new}")
        tensors[new] = checkpoint.tensors[name]
        if key:
            stored[new.removesuffix(f".{key}")] = owner
    return dataclasses.replace(checkpoint, tensors=tensors, stored_names=stored)


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The names in a file, `stored`, of the tensors of linear layers, by those that `model` has for them."""
    names = _Names(model, {name for name, _ in model.named_modules()})
    owners = (name.rpartition(".") for name in sorted(stored))
    return {f"{names.module(owner)}.{key}": f"{owner}.{key}" for owner, _, key in owners if key in ("weight", "bias")}


def in_file_names(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` of `model` as files of the architecture have them, whatever files the model was loaded from."""
    published = copy.copy(model)  # transformers would keep to what it did when it loaded the model
    vars(published)["_weight_conversions"] = None
    return revert_weight_conversion(published, tensors)


def file_names(model: PreTrainedModel, weights: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Names of linear layers in files of the architecture, as its makers publish them, by those in `model`.

    `weights` gives the shapes of the float weights of `model`, by name: of linear layers, and of stacked experts. The
    linear layers of one expert have names as in `with_model_names`; those of a stack that files hold as it is are not
    among the results.
    """
    shapes = {name: torch.empty(shape, device="meta") for name, shape in weights.items()}
    names = _Names(model, {name for name, _ in model.named_modules()})
    owners = (name.rpartition(".") for name in in_file_names(model, shapes))
    return {names.module(owner): owner for owner, _, key in owners if key == "weight"}


class _Names:
    """Transformers' renamings for the class of `model`, whose modules have the names `present`."""

    def __init__(self, model: PreTrainedModel, present: set[str]) -> None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix, self._present = f"{model.base_model_prefix}.", present

    def module(self, owner: str) -> str:
        """Name in the model of the checkpoint's module `owner`, which may be a part of an expert."""
        source = f"{owner}.weight"
        renamed, pattern = rename_source_key(source, self._renamings, self._converters)
        if pattern is None:
            return self._with_prefix(renamed.removesuffix(".weight") if renamed.endswith(".weight") else owner)
        sources = next(list(each.source_patterns) for each in self._converters if pattern in each.source_patterns)
        index = re.search(r"\.(\d+)\.[^.]+\.weight$", source)
        for projection, parts in PARTS.items():
            if index and renamed.endswith(f".{projection}_proj") and len(sources) == len(parts):
                part = parts[sources.index(pattern)]
                module = self._with_prefix(renamed.removesuffix(f".{projection}_proj"))
                return f"{module}.{index[1]}.{part}_proj"
        return owner

    def tensor(self, name: str) -> str:
        """Name in the model of the checkpoint's tensor `name`, which is not of a linear layer."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters)
        owner, _, key = (renamed if pattern is None else name).rpartition(".")
        return f"{self._with_prefix(owner)}.{key}" if owner else key

    def _with_prefix(self, owner: str) -> str:
        candidates = (owner, owner.removeprefix(self._prefix), self._prefix + owner)
        return next((name for name in candidates if name in self._present), owner)
