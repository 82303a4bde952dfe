"""Writing GPTQ checkpoints: version 1, which all tools read, where the zero points allow it, else version 2.

The tensors are described in `checkpoints/gptq.py`. Layers that are quantized otherwise than most are patterns in
GPTQModel's `dynamic`, and so are the layers that stay in float. Source: GPTQModel's ``QuantizeConfig``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...numerics.affine import code_offset, stored_codes
from ...numerics.exact_scales import exact_scales
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import WoqWeightDtype
from ..gptq import INT8_OFFSET, gptq_tensors
from .writer import (
    CheckpointWriter,
    Layer,
    LayerError,
    check_dtype,
    check_one_level,
    most_common,
    name_patterns,
)

WIDTHS: Mapping[WoqWeightDtype, tuple[int, ...]] = {
    WoqWeightDtype.INT2: (2,),
    WoqWeightDtype.INT3: (3,),
    WoqWeightDtype.INT4: (2, 3, 4),
    WoqWeightDtype.INT8: (8,),
}
"""Widths in which the codes of a weight dtype may be stored; the first that holds all codes and zero points is."""


@dataclass(frozen=True)
class _Settings:
    """Entries of the configuration that `dynamic` can override."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


class GptqWriter(CheckpointWriter):
    """Writes INT2, INT3, INT4 and INT8 weights, with or without zero points and act-order; INT4 as narrow as it is.

    Scales are stored in `scale_dtype`, or without it in the narrowest that has them; `percdamp` is what the weights
    were quantized with, for the record. `act_order` says that they were in act-order, though layers with groups in
    natural order may be among them.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        float_layers: Sequence[str],
        head: str | None,
        *,
        scale_dtype: torch.dtype | None = None,
        percdamp: float = 0.01,
        act_order: bool = False,
    ) -> None:
        super().__init__(layers, float_layers, head)
        self.scale_dtype, self.percdamp = scale_dtype, percdamp
        self._settings: dict[str, _Settings] = {}
        zero_points = {}
        for layer in layers:
            if layer.int8_input is not None:
                raise LayerError(
                    layer.name, 'it quantizes its input to 8 bits, GPTQ does not; write format="compressed-tensors"'
                )
            weight = layer.read()
            check_dtype(layer, weight, WIDTHS, "quantize it to INT4 or INT8, or write another format")
            check_one_level(layer, weight, 'leave the layer in float, or write format="gguf"')
            self._settings[layer.name], zero_points[layer.name] = _found(layer, weight, act_order)
        self.v2 = _version_2(self._settings, zero_points)

    @property
    def config(self) -> dict[str, Any]:
        base = most_common(self._settings.values())
        quantized_head = self.head in self._settings
        return {
            "quant_method": "gptq",
            **asdict(base),
            "static_groups": False,
            "true_sequential": True,
            "damp_percent": self.percdamp,
            "lm_head": quantized_head,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
            "pack_dtype": "int32",
            "dynamic": self._dynamic(base),
            "meta": {"quantizer": ["ipex_quant"]},
        }

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        weight = layer.read()
        scale_dtype = self.scale_dtype or exact_scales(weight.scales).dtype
        return gptq_tensors(weight, self._settings[layer.name].bits, v2=self.v2, scale_dtype=scale_dtype)

    def _dynamic(self, base: _Settings) -> dict[str, dict[str, Any]]:
        """Overrides by patterns of names: settings other than `base`, and none for layers in float."""
        others: Mapping[_Settings, list[str]] = defaultdict(list)
        for name, settings in self._settings.items():
            if settings != base:
                others[settings].append(name)
        own, every = asdict(base), (*self._settings, *self.float_layers)
        dynamic: dict[str, dict[str, Any]] = {}
        for settings, names in others.items():
            overrides = {key: value for key, value in asdict(settings).items() if value != own[key]}
            dynamic |= {f"+:{pattern}": overrides for pattern in name_patterns(names, every)}
        in_float = [name for name in self.float_layers if name != self.head]  # of which `lm_head` tells
        return dynamic | {f"-:{pattern}": {} for pattern in name_patterns(in_float, self._settings)}


def _found(layer: Layer, weight: QuantizedWeight, act_order: bool) -> tuple[_Settings, tuple[int, int]]:
    """How to store a layer, and its lowest and highest zero point as fields of version 2."""
    scheme = weight.scheme
    offset = code_offset(scheme.dtype) or INT8_OFFSET
    if weight.zero_points is None or not weight.zero_points.numel():
        lowest = highest = offset
    else:
        shift = INT8_OFFSET if scheme.dtype == WoqWeightDtype.INT8 else 0
        lowest, highest = (int(each) + shift for each in weight.zero_points.aminmax())
    bits = WIDTHS[scheme.dtype][-1]
    if len(WIDTHS[scheme.dtype]) > 1 and weight.codes.numel():
        largest = int(stored_codes(weight).max())
        fitting = (bits for bits in WIDTHS[scheme.dtype] if max(largest, highest) < 1 << bits)
        bits = next(fitting, bits)
    settings = _Settings(bits, scheme.group_size, scheme.symmetric, act_order or weight.g_idx is not None)
    return settings, (lowest, highest)


def _version_2(settings: Mapping[str, _Settings], zero_points: Mapping[str, tuple[int, int]]) -> bool:
    """Whether zero points are stored as they are, or minus one; LayerError if neither holds those of all layers."""
    zero = next((name for name, (lowest, _) in zero_points.items() if lowest == 0), None)
    full = next((name for name, (_, highest) in zero_points.items() if highest == 1 << settings[name].bits), None)
    if zero is None:
        return False
    if full is not None:
        raise LayerError(
            full,
            f"a zero point of {1 << settings[full].bits} needs GPTQ version 1, and one of 0 in {zero} version 2; write "
            "the two layers to different checkpoints, or leave one of them in float",
        )
    return True
