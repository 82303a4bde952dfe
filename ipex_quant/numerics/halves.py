"""A float32 tensor as two halves of 16 bits: the nearest bfloat16, and what it lacks.

The bits of a float32 are ``(high << 16) + low``, where `high` are the bits of the nearest bfloat16 (ties away from
zero) and `low`, int16, is signed. Joining gives back every bit, also of infinities and denormals; a NaN stays one.
Rounding, rather than cutting the low bits off, makes the upper half what float32 training would compute with in
bfloat16.
"""

from __future__ import annotations

import torch


def split_float32(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 and int16 halves of float32 `x`, in its shape and strides; raises TypeError for another dtype."""
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {x.dtype}")
    bits = x.detach().view(torch.int32)
    high = torch.where(x.isnan(), bits | 0x0040_0000, bits + 0x8000) >> 16
    low = torch.where(x.isnan(), 0, bits - (high << 16))
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_float32(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 tensor of the halves that `split_float32` made.

    A `low` that is stale, because something else has written `high`, moves the value by half a bfloat16 step at most.
    """
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        raise TypeError(f"high, low: expected bfloat16 and int16, got {high.dtype} and {low.dtype}")
    bits = high.detach().view(torch.int16).to(torch.int32) << 16
    rest = torch.where(high == 0, low.clamp(min=0), low)  # below zero, bits would wrap around into a NaN
    return (bits + rest).view(torch.float32)
