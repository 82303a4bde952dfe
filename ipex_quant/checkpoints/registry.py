"""The supported checkpoint formats by `quant_method`; each has a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..reading import shown
from .awq import AwqFormat
from .format import CheckpointFormat
from .gptq import GptqFormat

FORMATS: Mapping[str, Callable[[Mapping[str, object]], CheckpointFormat]] = MappingProxyType(
    {
        "awq": AwqFormat.from_config,
        "gptq": GptqFormat.from_config,
    }
)
"""Maps `quant_method` to the function that makes a format from a `quantization_config`."""


def format_from_config(config: Mapping[str, object]) -> CheckpointFormat:
    """The format that `config` describes; raises ValueError when its `quant_method` is not supported."""
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise ValueError(
            f"quant_method: expected one of {sorted(FORMATS)}, got {shown(method)}; convert the checkpoint"
        )
    return FORMATS[method](config)
