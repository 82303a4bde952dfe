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

from ...numerics.affine import stored_codes
from ...numerics.exact_scales import exact_scales
from ...numerics.int8 import StaticActivation
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL, WoqWeightDtype
from ..bit_fields import pack_fields, word_count
from ..format import Int8Input
from ..gptq import INT8_OFFSET
from ..tensors import LINEAR, e8m0_exponents
from .writer import CheckpointWriter, Layer, LayerError, check_dtype, check_one_level, name_patterns

PACKED = tuple(dict.fromkeys(LINEAR.values()))
"""Weight dtypes that `pack-quantized` holds."""

HELD = (*PACKED, WoqWeightDtype.FP8, WoqWeightDtype.FP4)
"""Weight dtypes that the format holds."""

NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FP4_GROUPS = {NVFP4: 16, MXFP4: 32}
"""Group sizes of FP4 weights."""

_LEAVE = "leave the layer in float"


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
    """Writes integer weights packed, INT8 weights with INT8 inputs, FP8 weights, and FP4 ones as NVFP4 or MXFP4."""

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
            targets = ["Linear"]
            if len(groups) > 1:
                targets = [f"re:{pattern}" for pattern in name_patterns(names, (*self._schemes, *self.float_layers))]
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
        layout = self._schemes[layer.name].layout
        if layout in FP4_GROUPS:
            return {"weight_packed": weight.codes, **_fp4_scales(layer, weight)}
        scales = {"weight_scale": exact_scales(weight.scales)}
        if layout != "pack-quantized":
            return {"weight": weight.codes, **scales, **_input_tensors(layer.int8_input)}
        return {**_packed_tensors(weight), **scales}


def _scheme(layer: Layer, weight: QuantizedWeight) -> _Scheme:
    """The scheme of one layer; LayerError if the format cannot hold it."""
    check_dtype(layer, weight, HELD, "quantize the layer to INT8, INT4 or FP8, or leave it in float")
    if weight.scheme.dtype == WoqWeightDtype.FP4:
        return _fp4_scheme(layer, weight)
    check_one_level(layer, weight, f'{_LEAVE}, or write format="gguf"')
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
            raise LayerError(layer.name, f"FP8 weights have no act-order there; {_LEAVE}")
        return _Scheme("float-quantized", 8, "float", True, size, False, None)
    bits = scheme.dtype.bits
    if layer.int8_input is not None:
        return _Scheme("int-quantized", bits, "int", True, size, False, _input_kind(layer))
    largest = 1 << bits
    if weight.zero_points is not None and weight.zero_points.ge(largest).any():
        raise LayerError(
            layer.name,
            f"it has a zero point of {largest}, compressed-tensors stores 0..{largest - 1} in {bits} bits; {_LEAVE}, "
            'or write format="gptq"',
        )
    counts = weight.shape[1:] if weight.zero_points is None else weight.shape
    unclear = next((count for count in counts if _is_unclear(count, bits)), None)
    if unclear is not None:
        raise LayerError(
            layer.name,
            f"{unclear} codes of {bits} bits take as many words in the format's old layout as in the new one, so that "
            f"no reader can tell which it is; {_LEAVE}, or quantize it to INT4",
        )
    return _Scheme("pack-quantized", bits, "int", scheme.symmetric, size, act_order, None)


def _is_unclear(count: int, bits: int) -> bool:
    """Whether `count` fields take the same number of words in a stream of bits and padded to whole words, but differ.

    The tensors are all that tells the two apart (see `checkpoints/compressed_tensors.py`).
    """
    return bool(32 % bits) and count > 32 // bits and word_count(count, bits) == -(-count // (32 // bits))


def _fp4_scheme(layer: Layer, weight: QuantizedWeight) -> _Scheme:
    """NVFP4 with super scales, else MXFP4; LayerError for other groups, and for scales that these do not have."""
    layout = MXFP4 if weight.super_scales is None else NVFP4
    size = weight.scheme.group_size
    if weight.g_idx is not None:
        raise LayerError(layer.name, f"FP4 weights have no act-order there; {_LEAVE}")
    if size != FP4_GROUPS[layout] or weight.shape[1] % size:
        raise LayerError(
            layer.name,
            f"{layout} has groups of {FP4_GROUPS[layout]} in {weight.shape[1]} input features, its size is {size}; "
            f"{_LEAVE}",
        )
    _fp4_scales(layer, weight)
    return _Scheme(layout, 4, "float", True, size, False, None)


def _fp4_scales(layer: Layer, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Stored scales of FP4 codes, which stand for twice their values; LayerError if they are not `weight`'s exactly."""
    if weight.super_scales is None:
        exponents = e8m0_exponents(2 * weight.scales)
        if exponents is None:
            raise LayerError(layer.name, f"its scales are no powers of two, as those of {MXFP4} are; {_LEAVE}")
        return {"weight_scale": exponents}
    supers = weight.super_scales.unique()
    overall = _inverse_of_inverse(2 * supers) if len(supers) == 1 and supers > 0 else None
    if overall is None:
        raise LayerError(layer.name, f"it has other super scales than one positive one, as {NVFP4} has; {_LEAVE}")
    scales = (weight.scales / supers).to(torch.float8_e4m3fn)
    if not torch.equal(scales.float() / 2 * (1 / overall), weight.scales):
        raise LayerError(layer.name, f"its scales are no float8 numbers, as those of {NVFP4} are; {_LEAVE}")
    return {"weight_scale": scales, "weight_global_scale": overall}


def _inverse_of_inverse(values: torch.Tensor) -> torch.Tensor | None:
    """A float32 number ``[1]`` whose inverse rounds to the one in `values`; None if there is none."""
    guess = 1 / values
    ends = torch.tensor([0.0, torch.inf])
    for number in (guess, *(torch.nextafter(guess, end) for end in ends)):
        if torch.equal(1 / number, values):
            return number
    return None


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
    strategy = "tensor_group" if scheme.layout == NVFP4 else strategy
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": None if strategy == "channel" else scheme.group_size,
        "actorder": "group" if scheme.act_order else None,
        "dynamic": False,
    }
    if scheme.layout in FP4_GROUPS:
        weights["scale_dtype"] = "torch.float8_e4m3fn" if scheme.layout == NVFP4 else "torch.uint8"
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
    bits = weight.scheme.dtype.bits
    fields, shift = stored_codes(weight), 0
    if bits == 8:
        fields, shift = fields.view(torch.uint8) ^ INT8_OFFSET, INT8_OFFSET
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
