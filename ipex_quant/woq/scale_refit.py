"""`refit_scales`: the scales with which given codes come closest to a weight."""

from __future__ import annotations

import torch

from ..numerics.affine import code_values, feature_groups
from ..numerics.quantized_weight import QuantizedWeight

_ROWS = 256
"""Rows at a time: each has a matrix of groups times groups."""

_DAMPING = 1e-4
"""Share of the diagonal that keeps a row's equations solvable where all codes of a group are zero."""


def refit_scales(
    weight: torch.Tensor, hessian: torch.Tensor, quantized: QuantizedWeight, scale_dtype: torch.dtype
) -> torch.Tensor:
    """Scales ``[N, groups]``, rounded to `scale_dtype`, with which the codes of `quantized` give the least error.

    The error of a row is ``d H d^T`` with `hessian` H ``[K, K]`` and d the difference from `weight`, float ``[N, K]``:
    a quadratic function of the row's scales, so that they solve linear equations. A row where rounding leaves no gain,
    or a scale would change its sign, keeps its scales.
    """
    groups = feature_groups(quantized)
    count = quantized.scales.shape[1]
    belongs = torch.nn.functional.one_hot(groups.long(), count).float()
    members = [column.nonzero()[:, 0] for column in belongs.t()]
    values = code_values(quantized)
    if quantized.zero_points is not None:
        values = values - quantized.zero_points[:, groups]
    scales = quantized.scales.clone()
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        codes, before = values[rows], quantized.scales[rows]
        rest = weight[rows].float() - codes * before[:, groups]
        products = torch.empty(len(codes), count, count)
        wanted = torch.empty(len(codes), count)
        for group, own in enumerate(members):
            curved = codes[:, own] @ hessian[own]
            wanted[:, group] = (curved * rest).sum(1)
            products[:, group] = curved.mul_(codes) @ belongs
        damped = products + torch.diag_embed(_DAMPING * products.diagonal(dim1=1, dim2=2) + 1e-20)
        change = torch.linalg.solve_ex(damped, wanted)[0]
        after = (before + change).to(scale_dtype).float()
        change = after - before
        # The error is now less by 2 wanted . change - change A change.
        gain = 2 * (wanted * change).sum(1) - (change.unsqueeze(1) @ products @ change.unsqueeze(2)).flatten()
        better = (gain > 0) & (after * before > 0).all(1) & torch.isfinite(after).all(1)
        scales[rows] = torch.where(better.unsqueeze(1), after, before)
    return scales
