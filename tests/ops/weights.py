"""Quantized weights that the tests of several ops share."""

from __future__ import annotations

import dataclasses

import torch

from ipex_quant.numerics import affine
from ipex_quant.numerics.nibbles import pack_nibbles
from ipex_quant.numerics.quantized_weight import QuantizedWeight


def shuffle_features(qw: QuantizedWeight, seed: int = 0) -> QuantizedWeight:
    """The same weight with its input features, and so its groups, in a random order (act-order)."""
    order = torch.randperm(qw.shape[1], generator=torch.Generator().manual_seed(seed))
    codes = affine.stored_codes(qw)[:, order]
    codes = pack_nibbles(codes) if codes.dtype == torch.uint8 else codes.contiguous()
    return dataclasses.replace(qw, codes=codes, g_idx=affine.feature_groups(qw)[order].int())
