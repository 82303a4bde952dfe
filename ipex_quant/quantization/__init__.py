"""IPEX's quantization API: configurations, `prepare`, `convert` and tensor helpers."""

from typing import TYPE_CHECKING, Any

from torch.ao.quantization import QConfig, QConfigMapping

from ..conversion import qconfig as _qconfig
from ..conversion.calibration import calibrate
from ..conversion.calibration_text import calibration_dataloader
from ..conversion.prepare import convert, prepare
from ..conversion.qconfig import (
    QConfigSmoothQuant,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)
from ..conversion.quantize_tensors import (
    dequantize_per_block,
    dequantize_per_channel,
    quantize_per_block,
    quantize_per_channel,
)
from ..conversion.rotation import rotate
from ..numerics.scheme import QConfigWoq, WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ..woq.auto_round import AutoRoundOptions
from ..woq.awq import AwqOptions

if TYPE_CHECKING:
    from ..autotune import autotune
    from ..conversion.auto_round import auto_round
    from ..conversion.awq import awq
    from ..conversion.gptq import gptq

__all__ = [
    "AutoRoundOptions",
    "AwqOptions",
    "QConfigSmoothQuant",
    "QConfigWoq",
    "WoqActQuantMode",
    "WoqLowpMode",
    "WoqWeightDtype",
    "WoqWeightQScheme",
    "auto_round",
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
    "rotate",
]


default_dynamic_qconfig: QConfig
"""INT8 weights, one scale a channel; activations are quantized as they come, one range a token."""

default_dynamic_qconfig_mapping: QConfigMapping
"""A new mapping whose global configuration is `default_dynamic_qconfig`."""

default_static_qconfig: QConfig
"""INT8 weights, one scale a channel; a histogram finds the range of each activation."""

default_static_qconfig_mapping: QConfigMapping
"""A new mapping whose global configuration is `default_static_qconfig`."""

_DEFAULTS = ("default_dynamic_qconfig", "default_static_qconfig")


def __getattr__(name: str) -> Any:
    # A mapping can be changed, so each one who asks for a default gets a new one.
    if name.removesuffix("_mapping") in _DEFAULTS:
        qconfig = getattr(_qconfig, name.removesuffix("_mapping"))()
        return QConfigMapping().set_global(qconfig) if name.endswith("_mapping") else qconfig
    # These four bring transformers in, which quantizing a plain module does without.
    if name == "gptq":
        from ..conversion.gptq import gptq

        return gptq
    if name == "awq":
        from ..conversion.awq import awq

        return awq
    if name == "auto_round":
        from ..conversion.auto_round import auto_round

        return auto_round
    if name == "autotune":
        from ..autotune import autotune

        return autotune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
