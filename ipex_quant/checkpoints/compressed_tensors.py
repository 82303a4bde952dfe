"""The checkpoint format compressed-tensors, as llm-compressor writes it.

`config_groups` give modules, named by `targets`, their scheme. A linear with weight ``[N, K]`` is stored as

=============================  ===============================================  ====================================
layout                         weight                                           `weight_scale`
=============================  ===============================================  ====================================
pack-quantized                 `weight_packed` int32 ``[N, words]``, code plus  ``[N, groups]``
                               ``2 ** (bits - 1)`` in `bits` along K
int-quantized                  `weight` int8 ``[N, K]``                         ``[N, groups]``, ``[N, 1]``, ``[1]``
float-quantized                `weight` float8 e4m3 ``[N, K]``                  the same, or of blocks
mxfp8-quantized                `weight` float8 e4m3 ``[N, K]``                  uint8 exponents ``[N, K / 32]``
nvfp4-pack-quantized           `weight_packed` uint8 ``[N, K / 2]``, E2M1       float8 ``[N, K / 16]``, divided by
                                                                                `weight_global_scale`
mxfp4-pack-quantized           the same                                         uint8 exponents ``[N, K / 32]``
=============================  ===============================================  ====================================

`weight_zero_point` is int8 of the scales' shape, or packed along N; `weight_g_idx` the group of every input feature.
Before 2026 widths that do not divide 32 were padded to whole words of ``32 // bits`` fields; now they are one stream of
bits. The tensors tell the layout. 8-bit integer activations are quantized where weights are per channel; others are
not. Source: compressed-tensors' ``quant_scheme.py`` and ``pack_quantized.py``, old and new.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..numerics.int8 import StaticActivation
from ..numerics.nibbles import as_bytes
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, PER_CHANNEL, WeightScheme, WoqWeightDtype
from ..reading import shown
from .bit_fields import unpack_fields, word_count
from .format import CheckpointFormat, Int8Input
from .patterns import Pattern
from .tensors import (
    INDEX_DTYPES,
    check,
    check_rank,
    coded_weight,
    e2m1_weight,
    e8m0_scales,
    fp8_weight,
    group_of,
    linear_codes,
    require,
    shape_or_stored,
    small_integer_weight,
    spread_blocks,
)

STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")

_WEIGHT, _PACKED, _SCALE, _ZERO = "weight", "weight_packed", "weight_scale", "weight_zero_point"
_G_IDX, _SHAPE, _GLOBAL = "weight_g_idx", "weight_shape", "weight_global_scale"
_INPUT_SCALE, _INPUT_ZERO = "input_scale", "input_zero_point"
_OWN = (_PACKED, _SCALE, _ZERO, _G_IDX, _SHAPE, _GLOBAL)


@dataclass(frozen=True)
class WeightArgs:
    """How the weights of a group are quantized, and its activations if they are, as a configuration says.

    Raises ValueError for values that do not exist.
    """

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    activations: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"weights.num_bits: expected 2..8, got {shown(self.bits)}")
        if self.kind not in ("int", "float"):
            raise ValueError(f"weights.type: expected 'int' or 'float', got {shown(self.kind)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"weights.strategy: expected one of {list(STRATEGIES)}, got {shown(self.strategy)}")
        size = self.group_size
        if self.strategy in ("group", "tensor_group") and (type(size) is not int or size <= 0):
            raise ValueError(f"weights.group_size: expected a size, got {shown(self.group_size)}")
        if self.strategy == "block" and (
            self.block is None or len(self.block) != 2 or not all(type(n) is int and n > 0 for n in self.block)
        ):
            raise ValueError(f"weights.block_structure: expected two sizes, got {shown(self.block)}")

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> WeightArgs:
        """The arguments that an entry of `config_groups` describes."""
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise ValueError(f"config_groups: expected weights with a scheme, got {shown(weights)}")
        strategy = weights.get("strategy") or (
            "channel" if weights.get("group_size") in (None, PER_CHANNEL) else "group"
        )
        block, activations = weights.get("block_structure"), group.get("input_activations")
        return cls(
            weights.get("num_bits", 8),
            weights.get("type", "int"),
            strategy,
            weights.get("group_size"),
            tuple(block) if isinstance(block, (list, tuple)) else None,
            activations if isinstance(activations, Mapping) else None,
        )

    def group(self, columns: int) -> int:
        """Columns that share a scale in a row of `columns`."""
        if self.strategy == "block" and self.block is not None:
            return self.block[1]
        if self.strategy in ("group", "tensor_group") and self.group_size is not None:
            return self.group_size
        return columns


@dataclass(frozen=True)
class CompressedTensorsFormat(CheckpointFormat):
    """How the modules of one compressed-tensors checkpoint are stored: `groups` are pairs of targets and arguments.

    Targets are names of modules, ``re:`` and a pattern of them, or names of classes, which all modules have here.
    """

    groups: tuple[tuple[tuple[str, ...], WeightArgs], ...]
    _patterns: dict[str, Pattern] = field(default_factory=dict, init=False, repr=False, compare=False)

    keys = (_PACKED, _WEIGHT, _SCALE, _ZERO, _G_IDX, _SHAPE, _GLOBAL, _INPUT_SCALE, _INPUT_ZERO, "input_global_scale")
    weight_keys = (_PACKED, _WEIGHT)
    unused = (".k_scale", ".v_scale", ".q_scale", ".k_proj.output_scale", ".v_proj.output_scale")

    def __post_init__(self) -> None:
        for targets, _ in self.groups:
            for target in targets:
                if target.startswith("re:"):
                    self._patterns[target] = Pattern(target.removeprefix("re:"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsFormat:
        """The format that a `quantization_config` describes; raises ValueError for sparse weights and rotations."""
        sparsity = config.get("sparsity_config") or {}
        kind = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
        if kind != "dense":
            raise ValueError(f"sparsity_config: expected none, got {shown(kind)}; sparse weights are not read")
        if config.get("transform_config"):
            raise ValueError("transform_config: expected none; rotations of activations are not supported")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"config_groups: expected groups of modules, got {shown(groups)}")
        found = []
        for name, group in groups.items():
            if not isinstance(group, Mapping):
                raise ValueError(f"config_groups: {shown(name)}: expected a scheme, got {shown(group)}")
            targets = group.get("targets")
            if not isinstance(targets, (list, tuple)) or not all(isinstance(target, str) for target in targets):
                raise ValueError(f"config_groups: {shown(name)}: targets: expected names, got {shown(targets)}")
            found.append((tuple(targets), WeightArgs.from_group(group)))
        return cls(tuple(found))

    def quantizes(self, stored: Collection[str]) -> bool:
        """A weight alone is a float one, with or without scales of its input."""
        return not set(_OWN).isdisjoint(stored)

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError or TypeError for tensors that do not fit each other or `shape`."""
        args = self._args(module_name)
        if _SHAPE in tensors:
            stored = tensors[_SHAPE].tolist()
            if len(stored) != 2 or any(want not in (None, own) for own, want in zip(stored, shape, strict=True)):
                raise ValueError(f"{_SHAPE}: expected {list(shape)}, got {shown(stored)}")
            shape = (stored[0], stored[1])
        if _PACKED not in tensors:
            return _read_plain(tensors, args, shape)
        if tensors[_PACKED].dtype == torch.uint8:
            return _read_fp4(tensors, args, shape)
        return _read_packed(tensors, args, shape)

    def int8_input(self, module_name: str, tensors: Mapping[str, torch.Tensor]) -> Int8Input | None:
        """8-bit integer activations of modules whose weight is INT8 with a scale per channel or one in all."""
        args = self._args(module_name)
        activations = args.activations
        weight = tensors.get(_WEIGHT)
        if activations is None or weight is None or weight.dtype != torch.int8 or _ZERO in tensors:
            return None
        if args.kind != "int" or args.strategy not in ("tensor", "channel"):
            return None
        if activations.get("type", "int") != "int" or activations.get("num_bits") != 8:
            return None
        if activations.get("dynamic"):
            return Int8Input()
        (scale,) = require(tensors, (_INPUT_SCALE,))
        check(_INPUT_SCALE, scale.reshape(-1), FLOAT_DTYPES, (1,))
        zero = tensors.get(_INPUT_ZERO)
        if zero is not None:
            check(_INPUT_ZERO, zero.reshape(-1), (torch.int8,), (1,))
        return Int8Input(StaticActivation(float(scale), 128 + (0 if zero is None else int(zero))))

    def _args(self, module_name: str) -> WeightArgs:
        """Arguments of the group that names the module, or matches its name, or else its class."""
        others = []
        for targets, args in self.groups:
            for target in targets:
                pattern = self._patterns.get(target)
                if target == module_name or (pattern is not None and pattern.matches(module_name)):
                    return args
                if pattern is None and "." not in target:
                    others.append(args)
        if not others:
            raise ValueError(f"{_WEIGHT}: stored quantized, though no target of config_groups matches the module")
        return others[0]


def _read_packed(
    tensors: Mapping[str, torch.Tensor], args: WeightArgs, shape: tuple[int | None, int | None]
) -> QuantizedWeight:
    packed, scales = require(tensors, (_PACKED, _SCALE))
    rows, columns = shape
    if rows is None or columns is None:
        raise ValueError(f"{_SHAPE}: missing, and nothing else tells the weight's shape")
    if args.kind != "int":
        raise ValueError(f"weights.type: expected 'int' for int32 words, got {args.kind!r}")
    group, bits = args.group(columns), args.bits
    scales = _grid(scales, rows, columns, args)
    half = 1 << (bits - 1)
    if bits == 4 and columns % 2 == 0:
        check(_PACKED, packed, (torch.int32,), (rows, word_count(columns, bits)))
        codes = as_bytes(packed)[:, : columns // 2]  # `QuantizedWeight` has the same bytes
    else:
        codes = linear_codes(_unpacked(_PACKED, packed, bits, rows, columns), bits)
    zero_points = torch.full(scales.shape, half, dtype=torch.int16)
    if _ZERO in tensors:
        along_rows = tensors[_ZERO].t() if tensors[_ZERO].dim() == 2 else tensors[_ZERO]
        zero_points = _unpacked(_ZERO, along_rows, bits, scales.shape[1], rows).t().to(torch.int16)
    g_idx = _order(tensors, columns)
    return coded_weight(codes, bits, scales, zero_points, group_of(group, columns), g_idx, (rows, columns))


def _read_plain(
    tensors: Mapping[str, torch.Tensor], args: WeightArgs, shape: tuple[int | None, int | None]
) -> QuantizedWeight:
    weight, scales = require(tensors, (_WEIGHT, _SCALE))
    check_rank(_WEIGHT, weight, 2)
    rows, columns = shape_or_stored(shape, weight.shape)
    check(_WEIGHT, weight, (torch.int8, torch.float8_e4m3fn), (rows, columns))
    group = args.group(columns)
    if weight.dtype == torch.float8_e4m3fn:
        if scales.dtype == torch.uint8:
            check(_SCALE, scales, (torch.uint8,), (rows, -(-columns // group)))
            return fp8_weight(weight, e8m0_scales(scales), group)
        return fp8_weight(weight, _grid(scales, rows, columns, args), group)
    scales = _grid(scales, rows, columns, args)
    zero_points = tensors.get(_ZERO)
    if zero_points is not None:
        check(_ZERO, zero_points.reshape(-1), (torch.int8,), (tensors[_SCALE].numel(),))
        zero_points = zero_points.reshape(tensors[_SCALE].shape).expand(scales.shape)
    if args.bits == 8 and zero_points is None and group == columns:
        return QuantizedWeight(
            weight, scales, None, None, WeightScheme(WoqWeightDtype.INT8, True, PER_CHANNEL), (rows, columns)
        )
    return small_integer_weight(weight, scales, zero_points, group, _order(tensors, columns))


def _read_fp4(
    tensors: Mapping[str, torch.Tensor], args: WeightArgs, shape: tuple[int | None, int | None]
) -> QuantizedWeight:
    packed, scales = require(tensors, (_PACKED, _SCALE))
    check_rank(_PACKED, packed, 2)
    rows, columns = shape_or_stored(shape, (packed.shape[0], 2 * packed.shape[1]))
    group = args.group(columns)
    check(_PACKED, packed, (torch.uint8,), (rows, columns // 2))
    check(_SCALE, scales, (torch.uint8, torch.float8_e4m3fn), (rows, -(-columns // group)))
    if scales.dtype == torch.uint8:
        return e2m1_weight(packed, e8m0_scales(scales), group, (rows, columns))
    (overall,) = require(tensors, (_GLOBAL,))
    check(_GLOBAL, overall.reshape(-1), (torch.float32,), (1,))
    if not overall > 0:
        raise ValueError(f"{_GLOBAL}: expected a number above 0, got {float(overall)}")
    return e2m1_weight(packed, scales.float(), group, (rows, columns), 1 / overall)


def _grid(scales: torch.Tensor, rows: int, columns: int, args: WeightArgs) -> torch.Tensor:
    """Float32 scales ``[rows, groups]`` of those that are stored for the strategy; ValueError for another shape."""
    groups = -(-columns // args.group(columns))
    if args.strategy == "block" and args.block is not None:
        check(_SCALE, scales, FLOAT_DTYPES, (-(-rows // args.block[0]), groups))
        return spread_blocks(scales, rows, args.block)
    if args.strategy == "tensor" or (scales.numel() == 1 and groups == 1):
        check(_SCALE, scales.reshape(-1), FLOAT_DTYPES, (1,))
        return scales.float().reshape(1, 1).expand(rows, 1).contiguous()
    scales = scales[:, None] if scales.dim() == 1 else scales
    check(_SCALE, scales, FLOAT_DTYPES, (rows, groups))
    return scales.float()


def _order(tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor | None:
    g_idx = tensors.get(_G_IDX)
    if g_idx is None:
        return None
    check(_G_IDX, g_idx, INDEX_DTYPES, (columns,))
    return None if (g_idx == -1).all() else g_idx  # as it is before any order was found


def _unpacked(name: str, words: torch.Tensor, bits: int, rows: int, count: int) -> torch.Tensor:
    """Fields uint8 ``[rows, count]`` of int32 words in rows, as one stream of bits or padded to whole words."""
    per_word = 32 // bits
    dense, padded = word_count(count, bits), -(-count // per_word)
    if words.dim() != 2 or words.shape[1] != padded or dense == padded:
        check(name, words, (torch.int32,), (rows, dense))
        if dense == padded and dense > 1 and 32 % bits:
            raise ValueError(f"{name}: {count} fields of {bits} bits take {dense} words padded and unpadded")
        return unpack_fields(words, bits, count)
    check(name, words, (torch.int32,), (rows, padded))
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    fields = (words[:, :, None] >> shifts).bitwise_and_((1 << bits) - 1)
    return fields.flatten(1)[:, :count].to(torch.uint8)
