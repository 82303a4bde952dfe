"""Factors that take outlier channels out of keys before they are quantized."""

from __future__ import annotations

import torch

OUTLIER_RATIO = 4.0
"""Least ratio of a channel's largest key to the median over the channels of its head, for it to be divided."""

LARGEST_FACTOR = 2.0**32
"""Upper bound of factors: beyond it the other channels round to 0, and queries times factors may overflow float32."""

FACTOR_TOKENS = 4
"""Least number of tokens to find factors from: the first token alone is often an outlier."""


def outlier_factors(*keys: torch.Tensor) -> torch.Tensor:
    """Factors that divide the channels of keys ``[.., Hkv, L, D]`` before INT8 quantization, float32 ``[Hkv, D]``.

    All channels of a token and head share one scale, so channels that are always large, such as those with a large bias
    in the projection, cost the others precision. Multiplying the queries by the same factors keeps the scores, and
    queries tend to be small where keys are large. A factor is a power of two, which does not round: it brings the
    largest key of an outlier channel to one to two times the median of its head. Factors of other channels are 1.
    Source: SmoothQuant's migration (arXiv 2211.10438), applied to the matmul of queries and keys.
    """
    largest = torch.stack([key.detach().abs().amax((0, 2)).float() for key in keys]).amax(0)
    ratio = largest / largest.median(-1, keepdim=True).values
    is_outlier = (ratio >= OUTLIER_RATIO) & (ratio < torch.inf)  # false for NaN too
    return torch.where(is_outlier, torch.exp2(torch.log2(ratio).floor()).clamp(max=LARGEST_FACTOR), 1.0)
