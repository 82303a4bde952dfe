"""bitsandbytes' checkpoints: NF4 and FP4 with or without double quantization, and INT8.

4 bits: `weight` uint8 ``[N * K / 2, 1]`` holds the codes in rows, the first of two in the high bits; `absmax` has a
factor of each `blocksize` codes, and `quant_map` the 16 values. With double quantization `absmax` is uint8, and the
factor ``nested_quant_map[absmax] * nested_absmax[block] + nested_offset``. `quant_state` is a JSON text with the sizes.
The values of NF4 are those here, those of FP4 times 192.

INT8: `weight` int8 ``[N, K]`` and `SCB` ``[N]``, ``w = weight * SCB / 127``. Its activations are not quantized here.
Source: bitsandbytes' ``QuantState.from_dict`` and ``Linear8bitLt``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..numerics.codebooks import BNB_FP4_VALUES, NF4_LEVELS
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, PER_CHANNEL, WeightScheme, WoqWeightDtype
from ..reading import parse_json, shown
from .format import CheckpointFormat
from .tensors import check, check_rank, require, shape_or_stored

_STATES = {kind: f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
_WEIGHT, _ABSMAX, _MAP = "weight", "weight.absmax", "weight.quant_map"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_SCB, _LAYOUT = "SCB", "weight_format"

FP4_STEPS = 192.0
"""All values of bitsandbytes' FP4 are multiples of 1/192."""

_TABLES = {
    "nf4": (WoqWeightDtype.NF4, NF4_LEVELS, 1.0),
    "fp4": (WoqWeightDtype.BNB_FP4, BNB_FP4_VALUES / FP4_STEPS, FP4_STEPS),
}
"""By kind the dtype here, the values that codes stand for, and what those of the dtype are multiplied by."""


class BitsAndBytesFormat(CheckpointFormat):
    """How bitsandbytes stores a module; its tensors tell which type it has."""

    keys = (_WEIGHT, _ABSMAX, _MAP, *_STATES.values(), *_NESTED, _SCB, _LAYOUT)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitsAndBytesFormat:
        """The format; nothing in a `quantization_config` is needed."""
        return cls()

    def quantizes(self, stored: Collection[str]) -> bool:
        """A weight alone is a float one."""
        return bool(set(stored) - {_WEIGHT})

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError or TypeError for tensors that do not fit each other or `shape`."""
        return _read_int8(tensors, shape) if _SCB in tensors else _read_4bit(tensors, shape)


def _read_int8(tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]) -> QuantizedWeight:
    weight, factors = require(tensors, (_WEIGHT, _SCB))
    check_rank(_WEIGHT, weight, 2)
    rows, columns = shape_or_stored(shape, weight.shape)
    check(_WEIGHT, weight, (torch.int8,), (rows, columns))
    check(_SCB, factors, FLOAT_DTYPES, (rows,))
    layout = tensors.get(_LAYOUT)
    if layout is not None and layout.numel() and layout.flatten()[0] != 0:
        raise ValueError(f"{_LAYOUT}: expected 0 (rows), got {layout.tolist()}; save the model on a CPU")
    scheme = WeightScheme(WoqWeightDtype.INT8, True, PER_CHANNEL)
    return QuantizedWeight(weight, factors.float()[:, None] / 127, None, None, scheme, (rows, columns))


def _read_4bit(tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]) -> QuantizedWeight:
    kind = next((kind for kind, key in _STATES.items() if key in tensors), None)
    if kind is None:
        raise ValueError(f"{_STATES['nf4']}: missing, the checkpoint holds only {sorted(tensors)} of this module")
    weight, absmax, levels = require(tensors, (_WEIGHT, _ABSMAX, _MAP))
    state = _state(tensors[_STATES[kind]])
    rows, columns = state["shape"]
    if any(want not in (None, own) for own, want in zip((rows, columns), shape, strict=True)):
        raise ValueError(f"{_STATES[kind]}: expected shape {list(shape)}, got {[rows, columns]}")
    size = state["blocksize"]
    if columns % size:
        raise ValueError(
            f"blocksize: blocks of {size} codes go across rows of {columns}, which no weight here can hold"
        )
    packed = weight.contiguous().view(torch.uint8).flatten()
    check(_WEIGHT, packed, (torch.uint8,), (rows * columns // 2,))
    check(_MAP, levels, (torch.float32,), (16,))
    scales = _factors(tensors, absmax, state, rows * columns // size).view(rows, columns // size)
    codes = (packed >> 4 | packed << 4).view(rows, columns // 2)
    dtype, values, steps = _TABLES[kind]
    if not torch.allclose(levels, values, rtol=0, atol=1e-6):
        raise ValueError(f"{_MAP}: expected the values of {kind.upper()}, got {levels.tolist()}")
    return QuantizedWeight(codes, scales / steps, None, None, WeightScheme(dtype, True, size), (rows, columns))


def _factors(
    tensors: Mapping[str, torch.Tensor], absmax: torch.Tensor, state: Mapping[str, Any], count: int
) -> torch.Tensor:
    if _NESTED[0] not in tensors:
        check(_ABSMAX, absmax, (torch.float32,), (count,))
        return absmax
    check(_ABSMAX, absmax, (torch.uint8,), (count,))
    nested, levels = require(tensors, _NESTED)
    size = state["nested_blocksize"]
    check(_NESTED[0], nested, (torch.float32,), (-(-count // size),))
    check(_NESTED[1], levels, (torch.float32,), (256,))
    return levels[absmax.int()] * nested.repeat_interleave(size)[:count] + state["nested_offset"]


def _state(packed: torch.Tensor) -> dict[str, Any]:
    """The sizes in a `quant_state`; ValueError unless they are sizes."""
    try:
        state = parse_json(bytes(packed.view(torch.uint8).tolist()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"weight.quant_state: not valid JSON ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"weight.quant_state: expected a JSON object, got {shown(state)}")
    shape = state.get("shape")
    sizes = [*shape, state.get("blocksize"), state.get("nested_blocksize", 1)] if isinstance(shape, list) else []
    if len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"weight.quant_state: expected a shape [N, K] and a blocksize, got {shown(state)}")
    offset = state.setdefault("nested_offset", 0.0)
    if not isinstance(offset, (int, float)):
        raise ValueError(f"weight.quant_state: nested_offset: expected a number, got {shown(offset)}")
    return state
