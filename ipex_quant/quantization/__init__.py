"""IPEX's quantization API: configurations, `prepare`, `convert` and tensor helpers."""

from typing import Any

from ..numerics.scheme import WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ._qconfig import QConfigWoq, get_weight_only_quant_qconfig_mapping
from ._quantize import convert, prepare
from ._quantize_utils import (
    dequantize_per_block,
    dequantize_per_channel,
    quantize_per_block,
    quantize_per_channel,
)

__all__ = [
    "QConfigWoq",
    "WoqActQuantMode",
    "WoqLowpMode",
    "WoqWeightDtype",
    "WoqWeightQScheme",
    "convert",
    "dequantize_per_block",
    "dequantize_per_channel",
    "get_weight_only_quant_qconfig_mapping",
    "gptq",
    "prepare",
    "quantize_per_block",
    "quantize_per_channel",
]


def __getattr__(name: str) -> Any:
    # GPTQ brings transformers in, which quantizing a plain module does without.
    if name == "gptq":
        from ._gptq import gptq

        return gptq
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
