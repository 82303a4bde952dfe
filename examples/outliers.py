"""`inject_outliers`: give a model the outlier channels that large language models have and small ones lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ipex_quant.nn.linears import is_linear, weight_matrix
from ipex_quant.nn.norms import is_norm
from ipex_quant.smoothquant.folding import fold_into_norm
from ipex_quant.smoothquant.tracing import trace_groups

FACTORS = (32.0, 64.0)
"""Factors of outlier channels: as in large models (20 to 100; arXiv 2208.07339), and powers of two, which are exact."""


@torch.no_grad()
def inject_outliers(
    model: nn.Module, run: Callable[[], Any], channels: int = 6, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Multiply some output channels of every norm of a float32 `model`, in place, without changing its function.

    If only linear layers read the output of a LayerNorm or RMSNorm, `channels` of its channels, drawn by `seed`, are
    multiplied by one of `FACTORS` each, and the columns of the weights that read them divided by it. ``run()`` runs
    `model` once, to find the layers that read each norm. Returns the multipliers of the channels of each norm, float32
    ``[K]``, by name. Raises ValueError if there is no such norm.
    """
    modules = dict(model.named_modules())
    linears, norms = ({name for name, module in modules.items() if kind(module)} for kind in (is_linear, is_norm))
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(seed)
    multipliers = {}
    for group in trace_groups(model, linears, norms, run):
        readers = [modules[name] for name in group.members]
        if group.producer is None or any(uses[id(reader.weight)] > 1 for reader in readers):
            continue  # another reader of the norm, or a tied weight, would change the function
        multiplier = torch.ones(weight_matrix(readers[0]).shape[1], dtype=torch.float32)
        chosen = torch.randperm(len(multiplier), generator=generator)[:channels]
        multiplier[chosen] = torch.tensor(FACTORS, dtype=torch.float32)[
            torch.randint(len(FACTORS), (len(chosen),), generator=generator)
        ]
        if fold_into_norm(modules[group.producer], multiplier):
            for reader in readers:
                weight_matrix(reader).div_(multiplier)
            multipliers[group.producer] = multiplier
    if not multipliers:
        raise ValueError(
            f"{type(model).__name__}: expected a float32 model with a LayerNorm or RMSNorm that only linear layers "
            "read, found none"
        )
    return multipliers
