"""Scales in narrow dtypes that hold their values exactly."""

from __future__ import annotations

import torch

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of scales in files, the one that all tools read first."""


def exact_scales(scales: torch.Tensor, dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES) -> torch.Tensor:
    """`scales`, float32, in the first of the float `dtypes` that has every value of them, else as they are."""
    for dtype in dtypes:
        narrow = scales.to(dtype)
        if torch.equal(narrow.float(), scales):
            return narrow
    return scales


def super_quotients(values: torch.Tensor, supers: torch.Tensor) -> torch.Tensor:
    """How many times its super scale, ``[..., supers]``, each scale ``[..., groups]`` is; 0 where that is 0.

    The result is ``[..., supers, groups / supers]``, rounded to float32.
    """
    by_super = values.unflatten(-1, (supers.shape[-1], -1))
    return (by_super / supers.unsqueeze(-1)).nan_to_num(0, 0, 0)
