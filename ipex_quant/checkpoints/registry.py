"""The supported checkpoint formats by `quant_method`; each has a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from ..numerics.quantized_weight import QuantizedWeight
from ..reading import shown
from .awq import AwqFormat
from .gptq import GptqFormat


class CheckpointFormat(Protocol):
    """How one format names and stores the tensors of a module."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of one module's tensors; the first is the weight."""

    @property
    def bias_key(self) -> str:
        """Name of one module's bias."""

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module from its `tensors` (by key).

        `shape` is the expected ``(out_features, in_features)``. Raises ValueError or TypeError for tensors that do not
        fit it, or each other.
        """


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
