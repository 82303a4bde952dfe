"""`CheckpointFormat`: what a format tells about the tensors of a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.int8 import StaticActivation
from ..numerics.quantized_weight import QuantizedWeight
from .file_tensors import Stored


@dataclass(frozen=True)
class Int8Input:
    """A module quantizes its input to 8 bits: as `static` says, or every token to its own range if that is None."""

    static: StaticActivation | None = None


class CheckpointFormat(ABC):
    """How one format names and stores the tensors of a module."""

    bias_key: str = "bias"
    """Name of one module's bias."""

    unused: tuple[str, ...] = ()
    """Ends of the names of tensors that change nothing here, such as scales of key and value caches."""

    factor_key: str = ""
    """Name of the factors of a module's input, "" if the format has none."""

    may_be_float: bool = False
    """Whether a checkpoint may have no quantized weights at all."""

    halves: bool = False
    """Whether `gate_proj` and `up_proj` of an expert are the halves of its parameter, whose rows may alternate."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Names of one module's tensors, which may have dots."""

    @property
    def weight_keys(self) -> tuple[str, ...]:
        """The `keys` of which a quantized module must have one."""
        return self.keys[:1]

    def presented(self, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """The tensors of a file under the names that `keys` expects: of each linear layer, and of each expert's."""
        return tensors

    def quantizes(self, stored: Collection[str]) -> bool:
        """Whether a module with the tensors `stored`, of `keys`, is quantized, though perhaps incompletely.

        A single tensor other than the weight makes no quantized module: norms have a `scale` too.
        """
        return len(stored) > 1 or not set(self.weight_keys).isdisjoint(stored)

    @abstractmethod
    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module from its `tensors` (by key).

        `shape` is the expected ``(out_features, in_features)``. Raises ValueError or TypeError for tensors that do not
        fit it, or each other.
        """

    def int8_input(self, module_name: str, tensors: Mapping[str, torch.Tensor]) -> Int8Input | None:
        """How the module quantizes its input to 8 bits, or None if it does not."""
        return None


def made_by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether `meta.quantizer` of a `quantization_config` names GPTQModel, which cuts stacked experts into halves."""
    meta = config.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    makers = makers if isinstance(makers, (list, tuple)) else [makers]
    return any(isinstance(maker, str) and maker.lower().startswith("gptqmodel") for maker in makers)
