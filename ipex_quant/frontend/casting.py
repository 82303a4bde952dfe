"""Casting the parameters of a model for inference in bfloat16 or float16."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import nn

logger = logging.getLogger("ipex_quant")

CAST_FOR_INFERENCE: frozenset[type[nn.Module]] = frozenset(
    (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Embedding,
        nn.EmbeddingBag,
        nn.LSTM,
        nn.MultiheadAttention,
        nn.modules.linear.NonDynamicallyQuantizableLinear,  # the last layer of a MultiheadAttention
    )
)
"""Modules whose parameters are cast, not their subclasses, which may compute otherwise. Norms take either dtype."""


def cast_for_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the float32 parameters of the modules in `CAST_FOR_INFERENCE` to `dtype`, in place; tied ones stay tied.

    A module that shares a parameter with one of another class keeps all of its own. Parameters of another dtype stay,
    and a logged warning names it.
    """
    refused: Counter[torch.dtype] = Counter()
    for param in dict.fromkeys(castable_parameters(model, CAST_FOR_INFERENCE)):
        if param.dtype == torch.float32:
            param.data = param.data.to(dtype)
        elif param.dtype != dtype:
            refused[param.dtype] += 1
    for other in refused:
        logger.warning("[NotSupported]Can't convert model's parameters dtype from %s to %s", other, dtype)


def castable_parameters(model: nn.Module, kinds: Collection[type[nn.Module]]) -> Iterator[nn.Parameter]:
    """The parameters of modules of these `kinds` that do not, directly or not, share one with a module of another."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append(module)
    kept = {module for modules in owners.values() for module in modules if type(module) not in kinds}
    while True:
        more = {module for modules in owners.values() if not kept.isdisjoint(modules) for module in modules} - kept
        if not more:
            break
        kept |= more
    yield from (param for param, modules in owners.items() if kept.isdisjoint(modules))
