"""Lookup of rows in a packed embedding table."""

from __future__ import annotations

import torch

from . import isa  # noqa: F401  loads the native library
from .fakes import register_fake

_embedding = torch.ops.ipex_quant.woq_embedding.default


def woq_embedding(
    data: torch.Tensor,
    ids: torch.Tensor,
    embedding_dim: int,
    perm: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dequantized rows `ids` of a packed weight, with the bits of `ipex_quant.numerics.affine.dequantize`.

    `data` and `perm` are a PackedWeight's, whose rows have `embedding_dim` features; `ids` is int64 or int32 of any
    shape. Only these rows are read. Returns ``[*ids.shape, embedding_dim]`` in `dtype`, float32, bfloat16 or float16,
    without a gradient. Raises RuntimeError when an argument does not fit the packed weight, and for an id out of range.
    """
    return _embedding(data, ids, perm, embedding_dim, dtype)


@register_fake("woq_embedding")
def _(packed, ids, perm, embedding_dim, dtype):
    return ids.new_empty(*ids.shape, embedding_dim, dtype=dtype)
