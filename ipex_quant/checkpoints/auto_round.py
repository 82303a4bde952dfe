"""The checkpoint format of auto-round: GPTQ's or AWQ's layout, as `packing_format` says, with bits of single modules.

========================================  =================================================
`packing_format`                          layout
========================================  =================================================
``auto_round``, ``auto_round:gptqmodel``  GPTQ version 2: zero points as they are
``auto_round:auto_gptq``                  GPTQ version 1: zero points minus one
``auto_round:auto_awq``                   AWQ's "gemm"
========================================  =================================================

Floats (`data_type` "mx_fp", "nv_fp", "fp") have the tensors of compressed-tensors. `extra_config` maps names of
modules, or patterns of them, to other `bits` and `group_size`. Source: auto-round's ``inference/backend.py`` and
``export/export_to_autoround``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..numerics.quantized_weight import QuantizedWeight
from ..reading import shown
from .awq import read_awq
from .compressed_tensors import CompressedTensorsFormat, WeightArgs
from .format import CheckpointFormat
from .gptq import GptqFormat, read_gptq
from .patterns import Pattern

PACKINGS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
}
"""Layouts by `packing_format`."""

FLOATS = {
    ("mx_fp", 4): ("group", 32),
    ("mx_fp", 8): ("group", 32),
    ("nv_fp", 4): ("tensor_group", 16),
    ("fp", 8): ("channel", None),
}
"""Strategy and group size of compressed-tensors by `data_type` and `bits`."""

FLOAT_BITS = 16
"""`bits` of a module that is left in float."""


@dataclass(frozen=True)
class AutoRoundFormat(CheckpointFormat):
    """How the modules of one auto-round checkpoint are stored: `bits` and `group_size`, and those of `extra`.

    Raises ValueError for an unknown `packing`, and for patterns in `extra` that are not supported.
    """

    packing: str
    bits: int | None = None
    group_size: int | None = None
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    _patterns: dict[str, Pattern] = field(default_factory=dict, init=False, repr=False, compare=False)

    keys = ("qweight", "qzeros", "scales", "g_idx")

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"packing_format: expected one of {list(PACKINGS)}, got {shown(self.packing)}")
        for name in self.extra:
            self._patterns[name] = Pattern(name)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoRoundFormat | CompressedTensorsFormat:
        """The format that a `quantization_config` describes; raises ValueError for an unknown `data_type`."""
        if config.get("data_type", "int") != "int":
            return _floats(config)
        packing = config.get("packing_format") or "auto_round:auto_gptq"
        return cls(
            packing if isinstance(packing, str) else "", config.get("bits"), config.get("group_size"), _extra(config)
        )

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; raises as `read_awq` and `read_gptq` do."""
        own = self._settings(module_name)
        _check_data_type("extra_config: data_type", own)
        bits, group_size = own.get("bits", self.bits), own.get("group_size", self.group_size)
        layout = PACKINGS[self.packing]
        if layout == "awq":
            if bits not in (None, 4):
                raise ValueError(f"bits: expected 4 in {self.packing}, got {shown(bits)}")
            return read_awq(tensors, group_size, shape=shape)
        checked = GptqFormat(bits, group_size)
        return read_gptq(tensors, checked.bits, checked.group_size, v2=layout == "gptq_v2", shape=shape)

    def _settings(self, module_name: str) -> Mapping[str, Any]:
        if module_name in self.extra:
            return self.extra[module_name]
        matches = (name for name, pattern in self._patterns.items() if pattern.matches(module_name))
        return self.extra.get(next(matches, ""), {})


def _extra(config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ValueError(f"extra_config: expected names of modules with settings, got {shown(extra)}")
    for name, settings in extra.items():
        if not isinstance(settings, Mapping):
            raise ValueError(f"extra_config: expected settings of {shown(name)}, got {shown(settings)}")
    return extra


def _check_data_type(name: str, settings: Mapping[str, Any]) -> None:
    data_type = settings.get("data_type", "int")
    if data_type != "int" and settings.get("bits") != FLOAT_BITS:
        raise ValueError(f"{name}: expected 'int' as other modules have, got {shown(data_type)}")


def _floats(config: Mapping[str, Any]) -> CompressedTensorsFormat:
    """The format of a checkpoint whose weights are floats of 4 or 8 bits, all of one kind."""
    stated = config.get("data_type"), config.get("bits")
    kind = next((kind for kind in FLOATS if kind == stated), None)
    if kind is None:
        raise ValueError(f"data_type, bits: expected 'int' or one of {list(FLOATS)}, got {shown(stated)}")
    extra = _extra(config)
    others = [name for name, own in extra.items() if own.get("bits", kind[1]) not in (kind[1], FLOAT_BITS)]
    if others:
        raise ValueError(f"extra_config: expected {kind[1]} bits for all modules, got others for {shown(others)}")
    strategy, group_size = FLOATS[kind]
    return CompressedTensorsFormat(((("Linear",), WeightArgs(kind[1], "float", strategy, group_size, None, None)),))
