"""Tells which modules are embeddings, by which factor they multiply rows, and which cannot be quantized."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .linears import weight_obstacle


class PackedEmbedding(nn.Embedding):
    """Base of quantized embeddings, by which other libraries (transformers) recognize them as embeddings.

    It has none of the parameters of an ``nn.Embedding``.
    """

    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = sparse = False

    def __init__(self) -> None:
        nn.Module.__init__(self)


class RowFactor(NamedTuple):
    """Factor of an embedding's rows: `value`, rounded to their dtype before the multiplication if `rounded`."""

    value: float = 1.0
    rounded: bool = False

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` times the factor, in their dtype; `rows` itself if the factor is 1."""
        if self.value == 1:
            return rows
        return rows * (torch.tensor(self.value).to(rows.dtype) if self.rounded else self.value)


class ScaledEmbedding(nn.Embedding):
    """An ``nn.Embedding`` whose rows are multiplied by a `factor`."""

    factor = RowFactor()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.factor.apply(super().forward(ids))


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.Embedding`` in float, or a subclass of one."""
    return isinstance(module, nn.Embedding) and not isinstance(module, PackedEmbedding)


def embedding_obstacle(module: nn.Embedding, read_weights: bool = True) -> str | None:
    """Reason why `module` cannot be replaced by a quantized embedding, or None."""
    if module.max_norm is not None:
        return "it changes its weight as it is read (max_norm)"
    if module.sparse or module.scale_grad_by_freq:
        return "it is made to be trained (sparse, scale_grad_by_freq)"
    if row_factor(module) is None:
        return f"{type(module).__name__} does not just look up rows, or these times a number"
    return weight_obstacle(module) if read_weights else None


@torch.no_grad()
def row_factor(module: nn.Embedding) -> RowFactor | None:
    """Factor by which `module` multiplies the rows of its table; None when it does anything else with them.

    A subclass that overrides forward is run on a small table to find out.
    """
    if type(module).forward is nn.Embedding.forward:
        return RowFactor()
    buffers = _buffers(module).values()
    if module._parameters.keys() != {"weight"} or module._modules or any(each.numel() != 1 for each in buffers):
        return None
    table = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    ids = torch.tensor([[4, 1, 0], [1, 3, 2]])
    try:
        value = _look_up(module, torch.ones_like(table), ids).flatten()[0].item()
        if not math.isfinite(value) or not torch.equal(_look_up(module, table, ids), F.embedding(ids, table) * value):
            return None
        narrow = table.bfloat16()
        result = _look_up(module, narrow, ids)
    except Exception:  # any failure of foreign code means that the module is no plain embedding
        return None
    factors = (RowFactor(value, rounded) for rounded in (False, True))
    return next((factor for factor in factors if torch.equal(result, factor.apply(F.embedding(ids, narrow)))), None)


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of `module`; of one on the meta device, what it would be filled with, where transformers keeps it."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    for name, buffer in buffers.items():
        value = getattr(module, f"scalar_{name}", None)
        if buffer.is_meta and isinstance(value, float):
            buffers[name] = torch.tensor(value, dtype=buffer.dtype, device="cpu")
    return buffers


def _look_up(module: nn.Embedding, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Result of the forward of `module` for `ids`, with `table` as its weight."""
    probe = copy.copy(module)
    rows, columns = table.shape
    padding = None if module.padding_idx is None else 1
    changes = {"_parameters": {"weight": table}, "num_embeddings": rows, "embedding_dim": columns}
    changes["_buffers"] = _buffers(module)
    probe.__dict__ |= changes | {"padding_idx": padding}
    return type(module).forward(probe, ids)
