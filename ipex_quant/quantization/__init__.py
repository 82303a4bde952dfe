"""IPEX's quantization API: configurations, `prepare`, `convert` and tensor helpers."""

import importlib
from typing import Any

from torch.ao.quantization import QConfigMapping

from ..numerics.scheme import WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ..woq.awq import AwqOptions
from . import _qconfig
from ._calibration import calibrate
from ._calibration_data import calibration_dataloader
from ._qconfig import (
    QConfigSmoothQuant,
    QConfigWoq,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)
from ._quantize import convert, prepare
from ._quantize_utils import (
    dequantize_per_block,
    dequantize_per_channel,
    quantize_per_block,
    quantize_per_channel,
)

__all__ = [
    "AwqOptions",
    "QConfigSmoothQuant",
    "QConfigWoq",
    "WoqActQuantMode",
    "WoqLowpMode",
    "WoqWeightDtype",
    "WoqWeightQScheme",
    "autotune",
    "awq",
    "calibrate",
    "calibration_dataloader",
    "convert",
    "default_dynamic_qconfig",
    "default_dynamic_qconfig_mapping",
    "default_static_qconfig",
    "default_static_qconfig_mapping",
    "dequantize_per_block",
    "dequantize_per_channel",
    "get_smooth_quant_qconfig_mapping",
    "get_weight_only_quant_qconfig_mapping",
    "gptq",
    "prepare",
    "quantize_per_block",
    "quantize_per_channel",
]


_DEFAULTS = ("default_dynamic_qconfig", "default_static_qconfig")


def __getattr__(name: str) -> Any:
    # A mapping can be changed, so each one who asks for a default gets a new one.
    if name.removesuffix("_mapping") in _DEFAULTS:
        qconfig = getattr(_qconfig, name.removesuffix("_mapping"))()
        return QConfigMapping().set_global(qconfig) if name.endswith("_mapping") else qconfig
    # GPTQ and AWQ bring transformers in, which quantizing a plain module does without.
    if name in ("gptq", "awq"):
        return getattr(importlib.import_module(f"._{name}", __name__), name)
    # A layer above this one, which IPEX's users look for here.
    if name == "autotune":
        return importlib.import_module("ipex_quant.autotune").autotune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
