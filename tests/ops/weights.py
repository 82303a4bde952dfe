"""Quantized weights, and the ways to multiply by them, that the tests of several ops share."""

from __future__ import annotations

import dataclasses

import torch

from ipex_quant.numerics import affine
from ipex_quant.numerics.nibbles import pack_nibbles
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype

KINDS = [
    (WoqWeightDtype.INT8, True),
    (WoqWeightDtype.INT8, False),
    (WoqWeightDtype.INT4, True),
    (WoqWeightDtype.INT4, False),
    (WoqWeightDtype.NF4, True),
    (WoqWeightDtype.FP8, True),
]
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
    return affine.quantize(draw(n, k, seed=seed) / k**0.5, scheme)


def shuffle_features(qw: QuantizedWeight, seed: int = 0) -> QuantizedWeight:
    """The same weight with its input features, and so its groups, in a random order (act-order)."""
    order = torch.randperm(qw.shape[1], generator=torch.Generator().manual_seed(seed))
    codes = affine.stored_codes(qw)[:, order]
    codes = pack_nibbles(codes) if codes.dtype == torch.uint8 else codes.contiguous()
    return dataclasses.replace(qw, codes=codes, g_idx=affine.feature_groups(qw)[order].int())
