"""Factors that take outlier channels out of keys before they are quantized."""

from __future__ import annotations

import torch

OUTLIER_RATIO = 4.0
"""How many times the median of its head a channel's largest key must be to be divided."""

LARGEST_FACTOR = 2.0**32
"""Beyond it the other channels are as good as 0, and queries that are multiplied by it may leave float32's range."""

FACTOR_TOKENS = 4
"""Tokens that factors are found from at least: the first one, alone, may look like no other."""


def outlier_factors(*keys: torch.Tensor) -> torch.Tensor:
    """What to divide the channels of keys ``[.., Hkv, L, D]`` by before they are quantized, float32 ``[Hkv, D]``.

    One scale serves all channels of a token, so that those in which keys are always large, as where projections have
    large biases, take the others their bits. Scores stay what they are when the queries are multiplied by the same
    factors, and queries tend to be small where keys are large. Factors are powers of two, which round nothing: what
    brings a channel to once or twice the median of the largest keys of its head. Source: SmoothQuant's migration (arXiv
    2211.10438), applied to the product of queries and keys.
    """
    largest = torch.stack([key.detach().abs().amax((0, 2)).float() for key in keys]).amax(0)
    ratio = largest / largest.median(-1, keepdim=True).values
    is_outlier = (ratio >= OUTLIER_RATIO) & (ratio < torch.inf)  # false for NaN too
    return torch.where(is_outlier, torch.exp2(torch.log2(ratio).floor()).clamp(max=LARGEST_FACTOR), 1.0)
