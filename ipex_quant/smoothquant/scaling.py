"""SmoothQuant's factors and the quantization parameters that follow from them.

With ``X`` the largest absolute value of each input channel over the calibration and ``W`` that of each column of the
weight, both plus 1e-6, the activation is multiplied by ``W^(1-alpha) / X^alpha`` and the weight by the reciprocal
(arXiv 2211.10438, equation 4). Everything is float32 and rounded as in IPEX 2.8, which computes the weight's factor
from powers instead of dividing 1 by the activation's factor.
"""

from __future__ import annotations

import torch

from ..numerics.int8 import StaticActivation, affine_parameters

_EPS = 1e-6
"""Keeps the factor of a channel that is always 0 finite; IPEX's value."""


def smoothing_factor(
    act_low: torch.Tensor, act_high: torch.Tensor, weight_low: torch.Tensor, weight_high: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Factor that multiplies every input channel of the activation, float32 ``[K]``.

    The ranges are float ``[K]``: of the activation over the calibration, and of the weight's columns over every member
    of a share group. Raises ValueError for an `alpha` outside 0..1, shapes that differ, NaN or Inf.
    """
    act, weight = _largest(act_low, act_high, weight_low, weight_high, alpha)
    return torch.pow(weight, 1 - alpha) / torch.pow(act, alpha)


def weight_smoothing_factor(
    act_low: torch.Tensor, act_high: torch.Tensor, weight_low: torch.Tensor, weight_high: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Factor that multiplies every weight column, float32 ``[K]``; arguments and errors of `smoothing_factor`."""
    act, weight = _largest(act_low, act_high, weight_low, weight_high, alpha)
    return torch.pow(act, alpha) / torch.pow(weight, 1 - alpha)


def bounded_factors(
    act_low: torch.Tensor, act_high: torch.Tensor, weight_low: torch.Tensor, weight_high: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`smoothing_factor` and `weight_smoothing_factor`, bounded for channels that calibration only saw as 0.

    The formula treats such a channel as if it reached 1e-6, and magnifies it so much that other values are clipped.
    The bound is the factor of a channel that reaches the activation's largest value. It is raised where the scaled
    weight column would else exceed the columns of the other channels and make their codes coarser. The other channels
    keep their factors bit for bit. Arguments, shapes and errors are those of `smoothing_factor`.
    """
    ranges = act_low, act_high, weight_low, weight_high
    for_act, for_weight = smoothing_factor(*ranges, alpha), weight_smoothing_factor(*ranges, alpha)
    unseen = (act_low == 0) & (act_high == 0)
    if not unseen.any() or unseen.all():
        return for_act, for_weight
    act, weight = _largest(*ranges, alpha)
    largest = torch.pow(weight, 1 - alpha) / torch.pow(act.max(), alpha)
    within_weight = weight / (weight * for_weight)[~unseen].max()
    bound = torch.maximum(largest, within_weight)
    bounded = unseen & (bound < for_act)
    return torch.where(bounded, bound, for_act), torch.where(bounded, bound.reciprocal(), for_weight)


def smooth_activation(act_low: torch.Tensor, act_high: torch.Tensor, s_act: torch.Tensor) -> StaticActivation:
    """Quantization of an activation times `s_act`, float32 ``[K]``, from its unscaled channel ranges, float ``[K]``.

    A channel that was constant in calibration gets a range for both signs, unless all channels were: its sign may
    differ later. Raises ValueError as `affine_parameters` does, or when the shapes differ.
    """
    if not act_low.shape == act_high.shape == s_act.shape:
        raise ValueError(
            "act_low, act_high, s_act: expected the same shape [K], "
            f"got {list(act_low.shape)}, {list(act_high.shape)} and {list(s_act.shape)}"
        )
    low, high = act_low.float() * s_act, act_high.float() * s_act
    constant = act_low == act_high
    if not constant.all():
        low, high = torch.where(constant, -low.abs(), low), torch.where(constant, high.abs(), high)
    scale, zero_point = affine_parameters(low.min(), high.max())
    return StaticActivation(scale.item(), int(zero_point), s_act)


def _largest(
    act_low: torch.Tensor, act_high: torch.Tensor, weight_low: torch.Tensor, weight_high: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest absolute value of every channel of the activation and the weight, plus 1e-6, float32 ``[K]``."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
    if not act_low.shape == act_high.shape == weight_low.shape == weight_high.shape:
        shapes = [list(t.shape) for t in (act_low, act_high, weight_low, weight_high)]
        raise ValueError(f"act_low, act_high, weight_low, weight_high: expected the same shape [K], got {shapes}")
    act = torch.maximum(act_low.float().abs(), act_high.float().abs()) + _EPS
    weight = torch.maximum(weight_low.float().abs(), weight_high.float().abs()) + _EPS
    if not (torch.isfinite(act).all() and torch.isfinite(weight).all()):
        raise ValueError("smoothing factor: expected finite ranges, got NaN or Inf; check inputs and weight")
    return act, weight
