"""Functions on tensors, in the place where IPEX has them."""

from __future__ import annotations

import torch

__all__ = ["interaction"]


def interaction(*features: torch.Tensor) -> torch.Tensor:
    """Return the first feature and the dot products of all pairs of N `features`, as in DLRM (arXiv:1906.00091).

    Each is ``[B, D]``; the result is ``[B, D + N * (N - 1) / 2]``, with the products of feature i and each before it
    ahead of those of feature i + 1. Raises ValueError without features and for shapes that differ.
    """
    if not features or features[0].dim() != 2 or any(f.shape != features[0].shape for f in features):
        raise ValueError(f"features: expected tensors of one shape [B, D], got {[list(f.shape) for f in features]}")
    stacked = torch.stack(features, dim=1)
    rows, columns = torch.tril_indices(len(features), len(features), offset=-1, device=stacked.device)
    products = torch.bmm(stacked, stacked.transpose(1, 2))[:, rows, columns]
    return torch.cat([features[0], products], dim=1)
