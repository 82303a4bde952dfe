"""The supported checkpoint formats by `quant_method`; each has a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..errors import ArgumentError
from ..reading import shown
from .auto_round import AutoRoundFormat
from .awq import AwqFormat
from .bitsandbytes import BitsAndBytesFormat
from .compressed_tensors import CompressedTensorsFormat
from .format import CheckpointFormat
from .fp8 import Fp8Format
from .gguf import GgufFormat
from .gptq import GptqFormat
from .hqq import HqqFormat
from .mxfp4 import Mxfp4Format
from .neural_compressor_default import default_format
from .quark import QuarkFormat
from .torchao import TorchaoFormat

FORMATS: Mapping[str, Callable[[Mapping[str, object]], CheckpointFormat]] = MappingProxyType(
    {
        "auto-round": AutoRoundFormat.from_config,
        "awq": AwqFormat.from_config,
        "bitsandbytes": BitsAndBytesFormat.from_config,
        "compressed-tensors": CompressedTensorsFormat.from_config,
        "fp8": Fp8Format.from_config,
        "gguf": GgufFormat.from_config,
        "gptq": GptqFormat.from_config,
        "hqq": HqqFormat.from_config,
        "intel/auto-round": AutoRoundFormat.from_config,
        "mxfp4": Mxfp4Format.from_config,
        "neural-compressor": default_format,
        "quark": QuarkFormat.from_config,
        "torchao": TorchaoFormat.from_config,
    }
)
"""Maps `quant_method` to the function that makes a format from a `quantization_config`."""


def checkpoint_methods() -> list[str]:
    """The `quant_method`s that are read, in order."""
    return sorted(FORMATS)


def format_from_config(config: Mapping[str, object]) -> CheckpointFormat:
    """The format that `config` describes; raises ValueError when its `quant_method` is not supported."""
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise ArgumentError(
            f"quant_method: expected one of {sorted(FORMATS)}, got {shown(method)}; convert the checkpoint"
        )
    return FORMATS[method](config)
