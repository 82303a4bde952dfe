"""Quantized weights, and the ways to multiply by them, that the tests of several ops share."""

from __future__ import annotations

import dataclasses

import torch

from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype

KINDS = [(dtype, symmetric) for dtype in WoqWeightDtype for symmetric in (True, False)[: 1 + dtype.has_integers]]
"""Dtypes, and whether they are symmetric."""

GROUP_SIZES = [-1, 1, 2, 4, 8, 16, 32, 64, 128, 256]
MODES = [
    *((mode, WoqActQuantMode.NONE) for mode in WoqLowpMode if mode != WoqLowpMode.INT8),
    *((WoqLowpMode.INT8, act) for act in WoqActQuantMode if act != WoqActQuantMode.NONE),
]
"""Every `lowp_mode` with every `act_quant_mode` that it takes."""


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(n: int, k: int, scheme: WeightScheme, seed: int = 0) -> QuantizedWeight:
    """A weight whose products with normal inputs are normal."""
    plain = WeightScheme(scheme.dtype, scheme.symmetric, scheme.group_size)
    return dress(affine.quantize(draw(n, k, seed=seed) / k**0.5, plain), scheme)


def dress(qw: QuantizedWeight, scheme: WeightScheme) -> QuantizedWeight:
    """The codes of a plain weight with the minimums and super scales of `scheme`, which change its values a little."""
    parts = {name: getattr(qw, name) for name in ("scales", "zero_points")}
    if scheme.minimums:
        parts["minimums"] = -parts["scales"] * parts.pop("zero_points")
    if scheme.super_group_size is not None:
        supers = scheme.super_count(qw.shape[1])
        for name in ("scales", "minimums"):
            if name in parts:
                runs = parts[name].unflatten(1, (supers, -1))
                own = (runs.abs().amax(-1, keepdim=True) / 127).half().float()
                steps = (runs / own.where(own > 0, torch.ones(()))).round().clamp(-128, 127)
                parts |= {f"super_{name}": own[..., 0].contiguous(), name: (steps * own).flatten(1) + 0.0}  # no -0.0
    parts = {"zero_points": None, **parts}
    return QuantizedWeight(qw.codes, g_idx=None, scheme=scheme, shape=qw.shape, **parts)


def stored_schemes(group_size: int, super_group_size: int) -> list[WeightScheme]:
    """Schemes with minimums, super scales, or both."""
    plain = (WoqWeightDtype.NF4, WoqWeightDtype.FP8, WoqWeightDtype.BNB_FP4)
    kinds = [(dtype, symmetric) for dtype, symmetric in KINDS if dtype not in plain]
    return [
        WeightScheme(dtype, symmetric, group_size, minimums, supers)
        for dtype, symmetric in kinds
        for minimums in (False, True)
        for supers in (None, super_group_size, -1)
        if (minimums or supers) and not (minimums and symmetric)
    ]


def shuffle_features(qw: QuantizedWeight, seed: int = 0) -> QuantizedWeight:
    """The same weight with its input features, and so its groups, in a random order (act-order)."""
    order = torch.randperm(qw.shape[1], generator=torch.Generator().manual_seed(seed))
    codes = affine.stored_codes(qw)[:, order]
    codes = affine.plain_codes(codes, qw.scheme.dtype)
    return dataclasses.replace(qw, codes=codes, g_idx=affine.feature_groups(qw)[order].int())
