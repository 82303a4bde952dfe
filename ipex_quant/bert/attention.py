"""Attention of the tokens of ragged sequences: natively, or in torch's operations with gradients and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from ..nn.prepacked import compute_dtype
from ..ops.gradient import needs_gradient
from .dropout import drop
from .tokens import Tokens

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(states: States, tokens: Tokens, scale: float, dropout: float) -> torch.Tensor:
    """Softmax attention ``[T, H, D]`` of queries, keys and values (`states`), each ``[T, H, D]``, in their dtype.

    `scale` multiplies the scores; attention weights are dropped with probability `dropout`. A token that sees none
    gets 0.
    """
    if dropout > 0 or needs_gradient(*states):
        # Probabilities are rounded to a lower precision in kernels without dropout only.
        dtype = compute_dtype(states[0].dtype) if dropout == 0 else torch.promote_types(states[0].dtype, torch.float32)
        return _attend_in_torch(tuple(x.to(dtype) for x in states), tokens, scale, dropout).to(states[0].dtype)
    if tokens.mask is not None:
        return ops.attention(*_batched(states, tokens), scale=scale, mask=tokens.mask).flatten(0, 1)
    query, key, value = states[0], tokens.select_keys(states[1]), tokens.select_keys(states[2])
    return ops.varlen_attention(query, key, value, tokens.starts, tokens.key_starts, scale=scale)


def _attend_in_torch(states: tuple[torch.Tensor, ...], tokens: Tokens, scale: float, dropout: float) -> torch.Tensor:
    if tokens.mask is not None:
        mask = tokens.mask if tokens.mask.dtype == torch.bool else tokens.mask.to(states[0].dtype)
        result = F.scaled_dot_product_attention(
            *_batched(states, tokens), attn_mask=mask, dropout_p=dropout, scale=scale
        )
        return result.transpose(1, 2).flatten(0, 1)
    if not tokens.lengths:
        return states[0]
    queries, keys = zip(*tokens.lengths, strict=True)
    query, key, value = states[0], tokens.select_keys(states[1]), tokens.select_keys(states[2])
    sequences = query.split(queries), key.split(keys), value.split(keys)
    results = list(sequences[0])
    for (_, length), members in tokens.groups.items():
        group = [_stacked([x[member] for member in members]).transpose(1, 2) for x in sequences]
        if length == 0:  # torch has no softmax of nothing
            result = torch.zeros_like(group[0])
        elif dropout == 0:
            result = F.scaled_dot_product_attention(*group, scale=scale)
        else:  # torch has no fused kernel with dropout either
            weights = ((group[0] * scale) @ group[1].transpose(2, 3)).softmax(dim=-1)
            result = drop(weights, dropout) @ group[2]
        for member, rows in zip(members, result, strict=True):
            results[member] = rows.transpose(0, 1)
    return torch.cat(results)


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _batched(states: tuple[torch.Tensor, ...], tokens: Tokens) -> list[torch.Tensor]:
    """Each of `states` as ``[batch, H, length, D]``."""
    return [x.unflatten(0, (tokens.batch, tokens.length)).transpose(1, 2) for x in states]
