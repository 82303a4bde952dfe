"""The precision in which torch may compute products of float32 tensors."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch


class FP32MathMode(IntEnum):
    """Precision of products in float32 matmuls and convolutions: exact, rounded to TF32, or to bfloat16."""

    FP32 = 0
    TF32 = 1
    BF32 = 2


_PRECISIONS = {FP32MathMode.FP32: "ieee", FP32MathMode.TF32: "tf32", FP32MathMode.BF32: "bf16"}
_MATMUL_PRECISIONS = {FP32MathMode.FP32: "highest", FP32MathMode.TF32: "high", FP32MathMode.BF32: "medium"}


def set_fp32_math_mode(mode: FP32MathMode = FP32MathMode.FP32, device: str = "cpu") -> None:
    """Let oneDNN compute float32 tensors in `mode`: sums stay float32, and so do results.

    It is allowed to, that is: on CPUs without instructions for `mode`, and in kernels that are not oneDNN's, such as
    those of this package, products stay exact. For matmuls this is `torch.set_float32_matmul_precision`, and counts for
    other devices too; for convolutions and LSTMs it is `torch.backends.mkldnn`, of which LSTMs of torch 2.13 take no
    notice.

    Raises ValueError for another mode, RuntimeError for a `device` other than "cpu" and, if torch finds one, "xpu".
    """
    _check_device(device)
    if mode not in _PRECISIONS:
        raise ValueError(f"mode: expected a FP32MathMode, got {mode!r}")
    # Set through torch.backends.mkldnn.matmul, torch.get_float32_matmul_precision would raise from then on.
    torch.set_float32_matmul_precision(_MATMUL_PRECISIONS[mode])
    onednn: Any = torch.backends.mkldnn
    onednn.conv.fp32_precision = _PRECISIONS[mode]
    onednn.rnn.fp32_precision = _PRECISIONS[mode]


def get_fp32_math_mode(device: str = "cpu") -> FP32MathMode:
    """The mode in which oneDNN may compute float32 matmuls, whoever set it; errors as of `set_fp32_math_mode`."""
    _check_device(device)
    onednn: Any = torch.backends.mkldnn
    precision = onednn.matmul.fp32_precision
    return next((mode for mode, name in _PRECISIONS.items() if name == precision), FP32MathMode.FP32)


def _check_device(device: str) -> None:
    if device == "xpu" and not torch.xpu.is_available():
        raise RuntimeError("device: torch finds no XPU; expected 'cpu'")
    if device not in ("cpu", "xpu"):
        raise RuntimeError(f"Unexpected device type {device}: expected 'cpu' or 'xpu'")
