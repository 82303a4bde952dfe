"""Tied weights: untied for transformers if one is quantized, kept as one packed weight if all are quantized alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from torch import nn

from ..nn import QuantizedEmbedding, WeightOnlyQuantizedLinear
from .description import is_pretrained


def tied_modules(model: nn.Module, names: Collection[str]) -> list[list[str]]:
    """Groups of the float modules `names` that have the same weight parameter; groups of one are left out."""
    groups = defaultdict(list)
    for name in names:
        weight = model.get_submodule(name)._parameters.get("weight")
        if weight is not None:
            groups[id(weight)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def share_tables(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Let the quantized embeddings of each group share one packed weight with its linear layer, or with each other.

    Embeddings whose weight was quantized differently keep their own.
    """
    for group in groups:
        modules = [model.get_submodule(name) for name in group]
        embeddings = [module for module in modules if isinstance(module, QuantizedEmbedding)]
        linears = [module for module in modules if isinstance(module, WeightOnlyQuantizedLinear)]
        tables = [*linears, *(embedding.table for embedding in embeddings)]
        for embedding in embeddings:
            same = next(table for table in tables if _is_same(table, embedding.table))
            if same is not embedding.table:
                embedding.share(same)


def _is_same(a: WeightOnlyQuantizedLinear, b: WeightOnlyQuantizedLinear) -> bool:
    if a is b:
        return True
    perms = (a._perm is None, b._perm is None)
    return torch.equal(a._packed, b._packed) and (all(perms) or (not any(perms) and torch.equal(a._perm, b._perm)))


def untie(model: nn.Module, quantized: Collection[str]) -> None:
    """Remove the parameters of the modules named `quantized` from transformers' record of tied weights.

    Call it while these modules are still float. Other parameters stay tied. The configuration is not changed, since
    models use its `tie_word_embeddings` for other purposes too. Does nothing for a model that is not transformers'.
    """
    if not is_pretrained(model):
        return
    quantized = set(quantized)
    for prefix, part in list(model.named_modules()):
        if is_pretrained(part):
            start = f"{prefix}." if prefix else ""
            ties = _ties(part)
            kept = _without(ties, {name.removeprefix(start) for name in quantized if name.startswith(start)})
            if kept != ties:
                part._tied_weights_keys = kept
                part.all_tied_weights_keys = _without(_all_ties(part), quantized)
    model.all_tied_weights_keys = _without(_all_ties(model), quantized)


def _ties(model: nn.Module) -> dict[str, str]:
    """The tied weights of `model` itself, ``{target: source}``; none that older code lists as names alone."""
    listed = isinstance(model._tied_weights_keys, (list, tuple))
    ties: dict[str, str] = {} if listed else model.get_expanded_tied_weights_keys()
    return ties


def _all_ties(model: nn.Module) -> dict[str, str]:
    """Those of `model` with all its parts; code that never calls transformers' `post_init` has no record of them."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return ties


def _without(ties: dict[str, str], quantized: set[str]) -> dict[str, str]:
    """`ties` ``{target: source}`` without quantized modules; the first target of a quantized source replaces it."""
    kept, heirs = {}, {}
    for target, source in ties.items():
        if _owner(target) in quantized:
            continue
        if _owner(source) in quantized:
            source = heirs.setdefault(source, target)
        if source != target:
            kept[target] = source
    return kept


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
