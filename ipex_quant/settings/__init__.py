"""Settings of the process, and of a region of code, under the names that they have in IPEX."""

from .compiler import compile
from .fp32_math import FP32MathMode, get_fp32_math_mode, set_fp32_math_mode
from .on_device import OnDevice
from .switches import (
    disable_auto_channels_last,
    enable_auto_channels_last,
    enable_onednn_fusion,
    set_logging_level,
)

__all__ = [
    "FP32MathMode",
    "OnDevice",
    "compile",
    "disable_auto_channels_last",
    "enable_auto_channels_last",
    "enable_onednn_fusion",
    "get_fp32_math_mode",
    "set_fp32_math_mode",
    "set_logging_level",
]
