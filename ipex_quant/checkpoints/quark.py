"""AMD Quark's checkpoints, `quant_method` "quark".

`global_quant_config` and `layer_quant_config`, by patterns of names, say how weights are quantized. A linear with
weight ``[N, K]`` is stored as `weight`, `weight_scale` and `weight_zero_point`:

====================  ==================================================  =============================================
`dtype`, `qscheme`    weight                                              scales
====================  ==================================================  =============================================
int4, uint4           int32, eight codes a word, with "reorder" in AWQ's  ``[groups, N]`` (``[N, groups]`` before 1.0)
per_group             order: ``[K, N / 8]``                               or ``[N]``; zero points are packed along N
per_channel           ``[N, K / 8]``
int8, uint8           int8 or uint8, ``[K, N]`` in groups, else           the same, and one in all
                      ``[N, K]``
fp8_e4m3              float8 ``[N, K]``                                   ``[N]``, or one in all
fp4, E8M0 per_group   uint8 ``[N, K / 2]``, the first in the low bits     uint8 exponents ``[N, K / 32]``
====================  ==================================================  =============================================

Activations are not quantized, but to 8-bit integers where weights are INT8 per channel. Source: Quark's ``pack.py``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..numerics.int8 import StaticActivation
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES
from ..reading import shown
from .awq import ORDER
from .bit_fields import unpack_fields
from .format import CheckpointFormat, Int8Input
from .tensors import (
    check,
    check_rank,
    e2m1_weight,
    e8m0_scales,
    fp8_weight,
    group_of,
    linear_weight,
    require,
    shape_or_stored,
)

_WEIGHT, _SCALE, _ZERO = "weight", "weight_scale", "weight_zero_point"
_INPUT_SCALE, _INPUT_ZERO = "input_scale", "input_zero_point"

INTEGERS = {"int4": (4, True), "uint4": (4, False), "int8": (8, True), "uint8": (8, False)}
"""Bits, and whether codes are signed, by `dtype`."""

DTYPES = (*INTEGERS, "fp8_e4m3", "fp4")
SCHEMES = ("per_tensor", "per_channel", "per_group")

_NIBBLE_OF_OUTPUT = torch.tensor([ORDER.index(output) for output in range(8)])


@dataclass(frozen=True)
class QuarkArgs:
    """How weights are quantized, as a configuration says; ValueError for what is not supported."""

    dtype: str
    scheme: str
    group_size: int | None
    inputs: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"weight.dtype: expected one of {list(DTYPES)}, got {shown(self.dtype)}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"weight.qscheme: expected one of {list(SCHEMES)}, got {shown(self.scheme)}")
        if self.scheme == "per_group" and (type(self.group_size) is not int or self.group_size <= 0):
            raise ValueError(f"weight.group_size: expected a size, got {shown(self.group_size)}")

    @classmethod
    def of(cls, name: str, config: Any) -> QuarkArgs | None:
        """Those of an entry of the configuration, None for one that leaves weights in float."""
        if not isinstance(config, Mapping):
            raise ValueError(f"{name}: expected how modules are quantized, got {shown(config)}")
        weight, inputs = config.get("weight"), config.get("input_tensors")
        if weight is None:
            return None
        if not isinstance(weight, Mapping):
            raise ValueError(f"{name}: weight: expected one way to quantize, got {shown(weight)}")
        group_size = weight.get("group_size")
        inputs = inputs if isinstance(inputs, Mapping) else None
        return cls(weight.get("dtype", ""), weight.get("qscheme", ""), group_size, inputs)


@dataclass(frozen=True)
class QuarkFormat(CheckpointFormat):
    """How the modules of one Quark checkpoint are stored: as `general` says, or the first of `layers` that matches."""

    general: QuarkArgs | None
    layers: Mapping[str, QuarkArgs | None] = field(default_factory=dict)
    reorder: bool = True

    keys = (_WEIGHT, _SCALE, _ZERO, _INPUT_SCALE, _INPUT_ZERO)
    weight_keys = (_SCALE,)
    unused = (".k_scale", ".v_scale", ".output_scale", ".output_zero_point", ".kv_scale")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuarkFormat:
        """The format that a `quantization_config` describes; raises ValueError for what is not supported."""
        export = config.get("export") or {}
        pack = export.get("pack_method", "reorder") if isinstance(export, Mapping) else export
        if pack not in ("reorder", "order"):
            raise ValueError(f"export.pack_method: expected 'reorder' or 'order', got {shown(pack)}")
        form = export.get("weight_format", "real_quantized")
        if form != "real_quantized":
            raise ValueError(f"export.weight_format: expected 'real_quantized', got {shown(form)}")
        layers = config.get("layer_quant_config") or {}
        if not isinstance(layers, Mapping):
            raise ValueError(f"layer_quant_config: expected patterns of names, got {shown(layers)}")
        found = {f"{name}": QuarkArgs.of(f"layer_quant_config: {shown(name)}", own) for name, own in layers.items()}
        general = QuarkArgs.of("global_quant_config", config.get("global_quant_config") or {})
        return cls(general, found, pack == "reorder")

    def quantizes(self, stored: Collection[str]) -> bool:
        """A weight alone is a float one."""
        return _SCALE in stored

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError or TypeError for tensors that do not fit each other or `shape`."""
        args = self._args(module_name)
        weight, scales = require(tensors, (_WEIGHT, _SCALE))
        check_rank(_WEIGHT, weight, 2)
        if not weight.numel():
            raise ValueError(f"{_WEIGHT}: expected rows and columns, got shape {list(weight.shape)}")
        if args.dtype in INTEGERS:
            return self._read_integers(args, weight, scales, tensors.get(_ZERO), shape)
        per_byte = 2 if args.dtype == "fp4" else 1
        rows, columns = shape_or_stored(shape, (weight.shape[0], per_byte * weight.shape[1]))
        dtype = torch.uint8 if args.dtype == "fp4" else torch.float8_e4m3fn
        check(_WEIGHT, weight, (dtype,), (rows, columns // per_byte))
        if args.dtype == "fp4":
            group = args.group_size or columns
            check(_SCALE, scales, (torch.uint8,), (rows, -(-columns // group)))
            return e2m1_weight(weight, e8m0_scales(scales), group, (rows, columns))
        if args.scheme == "per_group":
            raise ValueError("weight.qscheme: expected 'per_tensor' or 'per_channel' for fp8_e4m3, got 'per_group'")
        return fp8_weight(weight, _per_row(_SCALE, scales, rows).float(), columns)

    def int8_input(self, module_name: str, tensors: Mapping[str, torch.Tensor]) -> Int8Input | None:
        """8-bit integer activations of modules whose weight is INT8, if the configuration says so."""
        args = self._args(module_name)
        inputs = args.inputs or {}
        if args.dtype != "int8" or inputs.get("dtype") not in ("int8", "uint8"):
            return None
        if inputs.get("is_dynamic") or _INPUT_SCALE not in tensors:
            return Int8Input()
        scale, zero = tensors[_INPUT_SCALE], tensors.get(_INPUT_ZERO)
        check(_INPUT_SCALE, scale.reshape(-1), FLOAT_DTYPES, (1,))
        offset = 128 if inputs["dtype"] == "int8" else 0
        return Int8Input(StaticActivation(float(scale), offset + (0 if zero is None else int(zero.reshape(-1)[0]))))

    def _args(self, module_name: str) -> QuarkArgs:
        matches = (args for pattern, args in self.layers.items() if fnmatch.fnmatchcase(module_name, pattern))
        args = next(matches, self.general)
        if args is None:
            raise ValueError(f"{_WEIGHT}: stored quantized, though the configuration leaves the module in float")
        return args

    def _read_integers(
        self,
        args: QuarkArgs,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        shape: tuple[int | None, int | None],
    ) -> QuantizedWeight:
        bits, signed = INTEGERS[args.dtype]
        grouped = args.scheme == "per_group"
        fields = self._fields(_WEIGHT, weight, bits, signed)
        fields = fields.t().contiguous() if grouped else fields
        rows, columns = shape_or_stored(shape, fields.shape)
        check(_WEIGHT, fields, (torch.uint8,), (rows, columns))
        group = args.group_size if grouped and args.group_size is not None else columns
        groups = -(-columns // group)
        if grouped:
            scales = scales.t() if scales.shape == (groups, rows) else scales
            check(_SCALE, scales, FLOAT_DTYPES, (rows, groups))
        else:
            scales = _per_row(_SCALE, scales, rows)
        half = 1 << (bits - 1)
        zero_points = torch.full((rows, groups), half, dtype=torch.int16)
        if zeros is not None:
            packed = zeros if zeros.dim() == 2 else zeros.reshape(1, -1)
            found = self._fields(_ZERO, packed, bits, signed)
            if not grouped and len(found) == 1 and found.numel() not in (0, rows):
                found = found[:, :1].expand(1, rows)
            check(_ZERO, found, (torch.uint8,), (groups, rows))
            zero_points = found.t().to(torch.int16)
        return linear_weight(fields, bits, scales, zero_points, group_of(group, columns))

    def _fields(self, name: str, stored: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
        """Unsigned codes, uint8 ``[rows, count]``; signed ones are raised by half their range."""
        if bits == 8:
            check(name, stored, (torch.int8, torch.uint8, torch.int32), tuple(stored.shape))
            fields = stored.to(torch.int16).to(torch.uint8) if stored.dtype == torch.int32 else stored.view(torch.uint8)
        else:
            check(name, stored, (torch.int32,), tuple(stored.shape))
            fields = unpack_fields(stored, bits, 8 * stored.shape[1])
            if self.reorder:
                fields = fields.unflatten(1, (-1, 8))[..., _NIBBLE_OF_OUTPUT].flatten(1)
        return fields ^ (1 << (bits - 1)) if signed else fields


def _per_row(name: str, values: torch.Tensor, rows: int) -> torch.Tensor:
    """``[rows, 1]`` of one value a row, or one in all."""
    flat = values.reshape(-1)
    check(name, flat, FLOAT_DTYPES, (1,) if flat.numel() == 1 else (rows,))
    return flat[:, None].expand(rows, 1).contiguous()
