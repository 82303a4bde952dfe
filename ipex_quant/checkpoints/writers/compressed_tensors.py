"""Writing compressed-tensors checkpoints; `checkpoints/compressed_tensors.py` describes the tensors.

Layers that are quantized alike are a group of the configuration. One group has all classes of linear layers as its
target, and the layers that stay in float are in `ignore`; of several groups each lists patterns of names.
Sources: compressed-tensors' ``quant_scheme.py``, ``quant_args.py`` and ``pack_quantized.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...numerics.int8 import StaticActivation
from ...numerics.nibbles import unpack_nibbles
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL, WoqWeightDtype
from ..bit_fields import pack_fields
from ..format import Int8Input
from ..gptq import INT8_OFFSET
from .writer import CheckpointWriter, Layer, LayerError, check_dtype, exact_scales, name_patterns

PACKED_BITS: Mapping[WoqWeightDtype, int] = {WoqWeightDtype.INT4: 4, WoqWeightDtype.INT8: 8}
"""Weight dtypes that `pack-quantized` holds, and their widths."""

HELD = (*PACKED_BITS, WoqWeightDtype.FP8)
"""Weight dtypes that the format holds."""


@dataclass(frozen=True)
class _Scheme:
    """What the layers of one group have in common; `input` is None, "dynamic", "symmetric" or "asymmetric"."""

    layout: str
    bits: int
    kind: str
    symmetric: bool
    group_size: int
    act_order: bool
    input: str | None


class CompressedTensorsWriter(CheckpointWriter):
    """Writes INT4 and INT8 weights packed, INT8 weights with INT8 inputs, and FP8 weights."""

    def __init__(self, layers: Sequence[Layer], float_layers: Sequence[str], head: str | None) -> None:
        super().__init__(layers, float_layers, head)
        self._schemes = {layer.name: _scheme(layer, layer.read()) for layer in layers}

    @property
    def config(self) -> dict[str, Any]:
        groups: Mapping[_Scheme, list[str]] = defaultdict(list)
        for name, scheme in self._schemes.items():
            groups[scheme].append(name)
        entries = {}
        for index, (scheme, names) in enumerate(groups.items()):
            targets = ["Linear"] if len(groups) == 1 else self._targets(names)
            entries[f"group_{index}"] = {"targets": targets, **_entry(scheme)}
        layouts = {scheme.layout for scheme in groups}
        return {
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": entries,
            "ignore": list(self.float_layers),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        weight = layer.read()
        scales = {"weight_scale": exact_scales(weight.scales)}
        if self._schemes[layer.name].layout != "pack-quantized":
            return {"weight": weight.codes, **scales, **_input_tensors(layer.int8_input)}
        return {**_packed_tensors(weight), **scales}

    def _targets(self, names: Sequence[str]) -> list[str]:
        chosen = set(names)
        rest = [name for name in (*self._schemes, *self.float_layers) if name not in chosen]
        return [f"re:{pattern}" for pattern in name_patterns(names, rest)]


def _scheme(layer: Layer, weight: QuantizedWeight) -> _Scheme:
    """The scheme of one layer; LayerError if the format cannot hold it."""
    check_dtype(layer, weight, HELD, "quantize the layer to INT8, INT4 or FP8, or leave it in float")
    scheme, act_order = weight.scheme, weight.g_idx is not None
    size = scheme.group_size
    if weight.scales.shape[1] == 1 and weight.shape[1] != size:
        size = PER_CHANNEL
    if size != PER_CHANNEL and weight.shape[1] % size:
        raise LayerError(
            layer.name,
            f"its {weight.shape[1]} input features are no whole number of groups of {size}, as compressed-tensors "
            'wants; quantize it per channel or with smaller groups, or write format="gptq"',
        )
    if scheme.dtype == WoqWeightDtype.FP8:
        if act_order:
            raise LayerError(layer.name, "FP8 weights have no act-order there; leave the layer in float")
        return _Scheme("float-quantized", 8, "float", True, size, False, None)
    bits = PACKED_BITS[scheme.dtype]
    if layer.int8_input is not None:
        return _Scheme("int-quantized", bits, "int", True, size, False, _input_kind(layer))
    if scheme.dtype == WoqWeightDtype.INT4 and weight.zero_points is not None and weight.zero_points.gt(15).any():
        raise LayerError(
            layer.name,
            "it has a zero point of 16, compressed-tensors stores 0..15 in 4 bits; leave the layer in float, or write "
            'format="gptq"',
        )
    return _Scheme("pack-quantized", bits, "int", scheme.symmetric, size, act_order, None)


def _input_kind(layer: Layer) -> str:
    static = None if layer.int8_input is None else layer.int8_input.static
    if static is None:
        return "dynamic"
    if static.smoothing_factor is not None:
        raise LayerError(
            layer.name,
            "it multiplies its input by a smoothing factor, which compressed-tensors expects in the layer before; "
            "quantize with static INT8 without SmoothQuant, or dynamically",
        )
    return "symmetric" if static.zero_point == INT8_OFFSET else "asymmetric"


def _entry(scheme: _Scheme) -> dict[str, Any]:
    """The entry of a group in the configuration, without its targets."""
    strategy = "channel" if scheme.group_size == PER_CHANNEL else "group"
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": None if strategy == "channel" else scheme.group_size,
        "actorder": "group" if scheme.act_order else None,
        "dynamic": False,
    }
    dynamic = scheme.input == "dynamic"
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": scheme.input == "symmetric",
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
    }
    return {
        "weights": weights,
        "input_activations": None if scheme.input is None else activations,
        "output_activations": None,
        "format": scheme.layout,
    }


def _packed_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Codes and zero points as unsigned fields, the first along the input, the second along the output features."""
    bits = PACKED_BITS[weight.scheme.dtype]
    if bits == 8:
        fields, shift = weight.codes.view(torch.uint8) ^ INT8_OFFSET, INT8_OFFSET
    else:
        fields, shift = unpack_nibbles(weight.codes, weight.shape[1]), 0
    tensors = {
        "weight_packed": pack_fields(fields, bits),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        zero_points = (weight.zero_points + shift).to(torch.uint8)
        tensors["weight_zero_point"] = pack_fields(zero_points.t().contiguous(), bits).t().contiguous()
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def _input_tensors(int8_input: Int8Input | None) -> dict[str, torch.Tensor]:
    static: StaticActivation | None = None if int8_input is None else int8_input.static
    if static is None:
        return {}
    tensors = {"input_scale": torch.tensor([static.scale], dtype=torch.float32)}
    if static.zero_point != INT8_OFFSET:
        tensors["input_zero_point"] = torch.tensor([static.zero_point - INT8_OFFSET], dtype=torch.int8)
    return tensors
