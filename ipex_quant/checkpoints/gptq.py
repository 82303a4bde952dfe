"""The GPTQ checkpoint format, versions 1 and 2, in 2, 3, 4 and 8 bits, and GPTQModel's in planes.

A linear with weight ``[N, K]`` is stored as

- ``qweight`` int32 ``[ceil(K * bits / 32), N]``: the codes, a bit stream along K (see `bit_fields`);
- ``qzeros`` int32 ``[groups, ceil(N * bits / 32)]``: the zero points, a bit stream along N; version 1 stores them
  minus one, version 2 unchanged;
- ``scales`` ``[groups, N]``;
- ``g_idx`` int32 ``[K]``: the group of every input feature; unordered when `desc_act` is set without `static_groups`,
  else ``k // group_size``, which some files leave out or fill with zeros.

The weight is ``w[n, k] = scales[g, n] * (code[k, n] - zero_point[g, n])`` with ``g = g_idx[k]``. "gptq_p" is version 2
with the bits of 32 codes in planes (see `unpack_planes`), also of 5, 6 and 7 bits, which exist in no other layout.
Sources: AutoGPTQ's ``QuantLinear.pack``, GPTQModel's ``QuantizeConfig`` and ``planar_packing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..numerics.affine import code_offset
from ..numerics.nibbles import as_bytes, unpack_nibbles
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, PER_CHANNEL, WeightScheme, WoqWeightDtype
from ..reading import shown
from .bit_fields import pack_fields, unpack_fields, unpack_planes, word_count
from .file_tensors import Stored
from .format import CheckpointFormat, made_by_gptqmodel
from .neural_compressor import FACTOR, is_nf4, read_nf4, without_wrappers
from .patterns import Pattern
from .tensors import (
    INDEX_DTYPES,
    LINEAR,
    check,
    check_rank,
    integer_weight,
    is_shard,
    linear_codes,
    require,
    resolve_group_size,
    shard_weight,
    signed_offset,
)

BITS = (4, 8, 3, 2)
"""Supported widths, the most common first: with fewer than 32 in_features, several can fit the shapes."""

PLANAR_BITS = (4, 8, 3, 5, 6, 2, 7)
"""Widths in planes."""

VERSIONS = {"gptq": False, "gptq_v2": True, "gptq_p": True}
"""Names of the supported layouts; the value says whether zero points are stored unchanged (version 2)."""

PLANAR = "gptq_p"

INT8_OFFSET = 128
"""Difference between a stored 8-bit code, 0..255, and an INT8 code."""

_OVERRIDABLE = ("bits", "group_size", "desc_act", "static_groups")

_WEIGHT, _ZEROS, _SCALES, _G_IDX = "qweight", "qzeros", "scales", "g_idx"


@dataclass(frozen=True)
class GptqFormat(CheckpointFormat):
    """How the modules of one GPTQ checkpoint are stored.

    `bits` and `group_size` None are inferred from each module's shapes. `dynamic` maps GPTQModel's patterns of module
    names to overrides; the first `Pattern` that matches at the start of the name counts. Its prefix ``-:`` leaves the
    module in float; ``+:`` or no prefix overrides `bits`, `group_size`, `desc_act` and `static_groups`. `desc_act` says
    that ``g_idx`` is needed to know the groups, unless `static_groups` kept them in natural order. Raises ValueError
    for other bits or invalid values.
    """

    bits: int | None = None
    group_size: int | None = None
    v2: bool = False
    planar: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    desc_act: bool = False
    static_groups: bool = False
    halves: bool = False
    _patterns: dict[str, Pattern] = field(default_factory=dict, init=False, repr=False, compare=False)

    keys = (_WEIGHT, _ZEROS, _SCALES, _G_IDX, FACTOR, "scale_bf16_to_fp8")
    factor_key = FACTOR

    def __post_init__(self) -> None:
        widths = PLANAR_BITS if self.planar else BITS
        if self.bits is not None and self.bits not in widths:
            raise ValueError(f"bits: expected one of {sorted(widths)} for GPTQ, got {shown(self.bits)}")
        if self.group_size is not None and not isinstance(self.group_size, int):
            raise ValueError(f"group_size: expected an integer, got {shown(self.group_size)}")
        for name in ("desc_act", "static_groups"):
            if getattr(self, name) not in (False, True):
                raise ValueError(f"{name}: expected true or false, got {shown(getattr(self, name))}")
        for pattern, overrides in self.dynamic.items():
            try:
                self._patterns[pattern] = Pattern(_regex(pattern))
            except ValueError as error:
                raise ValueError(f"dynamic: {error}") from error
            if not pattern.startswith("-:") and not isinstance(overrides, Mapping):
                raise ValueError(f"dynamic: expected a mapping of overrides for {pattern!r}, got {shown(overrides)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GptqFormat:
        """The format that a `quantization_config` describes; raises ValueError for an unsupported layout."""
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        if layout not in VERSIONS or config.get("is_marlin_format"):
            layout = "marlin" if layout in VERSIONS else layout
            raise ValueError(
                f"checkpoint_format: expected one of {list(VERSIONS)}, got {shown(layout)}; save the checkpoint as "
                "'gptq'"
            )
        meta = config.get("meta")
        meta = meta if isinstance(meta, Mapping) else {}
        pack_dtype = config.get("pack_dtype") or meta.get("pack_dtype") or "int32"
        if str(pack_dtype).removeprefix("torch.") != "int32":
            raise ValueError(
                f"pack_dtype: expected 'int32', got {shown(pack_dtype)}; save the checkpoint with int32 words"
            )
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise ValueError(f"dynamic: expected a mapping of patterns to overrides, got {type(dynamic).__name__}")
        flags: dict[str, Any] = {"desc_act": config.get("desc_act"), "static_groups": config.get("static_groups")}
        if flags["static_groups"] is None:
            flags["static_groups"] = meta.get("static_groups")  # where GPTQModel records it
        flags = {name: value for name, value in flags.items() if value is not None}
        flags["halves"] = made_by_gptqmodel(config)
        return cls(config.get("bits"), config.get("group_size"), VERSIONS[layout], layout == PLANAR, dynamic, **flags)

    def presented(self, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """`tensors`, without the names of neural-compressor's wrappers."""
        return without_wrappers(tensors)

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module from its `tensors`.

        Raises as `read_gptq` does, and ValueError for a missing ``g_idx`` that `desc_act` needs.
        """
        settings = self._overridden(module_name)
        if is_nf4(tensors):
            return read_nf4(tensors, settings.group_size, shape)
        weight = read_gptq(
            tensors, settings.bits, settings.group_size, v2=settings.v2, planar=settings.planar, shape=shape
        )
        if settings.desc_act and not settings.static_groups and weight.scales.shape[1] > 1:
            g_idx = tensors.get(_G_IDX)
            if g_idx is None or not g_idx.any():
                raise ValueError(
                    f"{_G_IDX}: {'missing' if g_idx is None else 'all zero'}, though the configuration says desc_act: "
                    f"nothing tells which of {weight.scales.shape[1]} groups a feature is in; get a complete "
                    "checkpoint, or set static_groups in the configuration if it was quantized with it"
                )
        return weight

    def _overridden(self, module_name: str) -> GptqFormat:
        for pattern, overrides in self.dynamic.items():
            if self._patterns[pattern].matches(module_name):
                if pattern.startswith("-:"):
                    raise ValueError(f"{_WEIGHT}: stored, though dynamic leaves the module in float by {pattern!r}")
                return replace(self, dynamic={}, **{key: overrides[key] for key in _OVERRIDABLE if key in overrides})
        return self


def read_gptq(
    tensors: Mapping[str, torch.Tensor],
    bits: int | None = None,
    group_size: int | None = None,
    *,
    v2: bool = False,
    planar: bool = False,
    shape: tuple[int | None, int | None] = (None, None),
) -> QuantizedWeight:
    """Read ``qweight``, ``qzeros``, ``scales`` and, if there, ``g_idx`` of one module.

    ``g_idx`` may be of a shard, a part of the input features with the scales and zero points of all groups.
    Codes and zero points stay the same; 7 and 8 bits become INT8. `shape` is the expected
    ``(out_features, in_features)``. `bits` None is inferred and needs in_features, from `shape` or ``g_idx``. Raises
    ValueError for missing, truncated or inconsistent tensors, and TypeError for another dtype.
    """
    qweight, qzeros, scales = require(tensors, (_WEIGHT, _ZEROS, _SCALES))
    g_idx = tensors.get(_G_IDX)
    check_rank(_WEIGHT, qweight, 2)
    check_rank(_SCALES, scales, 2)
    groups, out_features = scales.shape
    if shape[0] is not None and out_features != shape[0]:
        raise ValueError(f"{_SCALES}: expected shape [groups, {shape[0]}], got {list(scales.shape)}")
    in_features = shape[1] if shape[1] is not None else _stored_in_features(qweight, g_idx, bits)
    bits = bits if bits is not None else _infer_bits(qweight, in_features)
    size = resolve_group_size(group_size, in_features, groups)
    scheme = WeightScheme(LINEAR[bits], symmetric=False, group_size=size)
    if planar and (in_features % 32 or out_features % 32):
        raise ValueError(f"{_WEIGHT}: planes are of 32 codes, which do not divide {out_features} x {in_features}")

    check(_WEIGHT, qweight, (torch.int32,), (word_count(in_features, bits), out_features))
    shard = (
        g_idx is not None
        and group_size is not None
        and qzeros.shape[:1] == (groups,)
        and is_shard(g_idx, scales.t(), group_size)
    )
    check(_SCALES, scales, FLOAT_DTYPES, (groups if shard else scheme.group_count(in_features), out_features))
    check(_ZEROS, qzeros, (torch.int32,), (groups, word_count(out_features, bits)))
    if g_idx is not None:
        check(_G_IDX, g_idx, INDEX_DTYPES, (in_features,))

    unpack = unpack_planes if planar else unpack_fields
    zero_points = unpack(qzeros, bits, out_features).t().to(torch.int16) + (0 if v2 else 1)
    zero_points -= signed_offset(bits)
    if bits == 4 and in_features % 2 == 0:
        codes = as_bytes(qweight.t())[:, : in_features // 2]  # `QuantizedWeight` has the same bytes
    else:
        codes = linear_codes(unpack(qweight.t(), bits, in_features), bits)
    weight_shape = (out_features, in_features)
    if g_idx is not None and shard:
        return shard_weight(codes, scales.t().float(), zero_points, g_idx, scheme.dtype, weight_shape)
    return integer_weight(codes, scales.t(), zero_points, g_idx, scheme, weight_shape)


def gptq_tensors(
    qw: QuantizedWeight, bits: int | None = None, *, v2: bool = False, scale_dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Return ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of an integer weight: the inverse of `read_gptq`.

    `bits`, 2, 3, 4 or 8, defaults to the dtype's; 2 or 3 store an INT4 weight whose codes fit. Scales are rounded to
    `scale_dtype`. Raises ValueError for another dtype and for values the format cannot express: codes or zero points
    beyond `bits`, zero point 0 in version 1, scales that overflow or become 0.
    """
    dtype = qw.scheme.dtype
    if not dtype.has_integers or dtype.bits not in BITS or qw.scheme.minimums:
        raise ValueError(f"dtype: GPTQ files hold integers of {sorted(BITS)} bits with zero points, got {qw.scheme}")
    in_features = qw.shape[1]
    if dtype == WoqWeightDtype.INT8:
        widths: tuple[int, ...] = (8,)
        offset = INT8_OFFSET
        codes = qw.codes.view(torch.uint8) ^ INT8_OFFSET
    else:
        widths, offset = (4, 3, 2) if dtype.bits == 4 else (dtype.bits,), code_offset(dtype)
        codes = unpack_nibbles(qw.codes, in_features)
    bits = widths[0] if bits is None else bits
    if bits not in widths:
        raise ValueError(f"bits: expected one of {widths} for {dtype.name} codes, got {bits}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"codes: expected values below {1 << bits} for {bits} bits, got {int(codes.max())}")

    if qw.zero_points is None:
        zero_points = torch.full_like(qw.scales, offset, dtype=torch.int16)
    else:
        zero_points = qw.zero_points + (INT8_OFFSET if bits == 8 else 0)
    first = 0 if v2 else 1
    if ((zero_points < first) | (zero_points >= first + (1 << bits))).any():
        raise ValueError(
            f"zero_points: GPTQ version {2 if v2 else 1} stores {first}..{first + (1 << bits) - 1} in {bits} bits, got "
            f"{int(zero_points.min())}..{int(zero_points.max())}; write version {1 if v2 else 2}"
        )
    scales = qw.scales.to(scale_dtype)
    if not (torch.isfinite(scales) & ((scales != 0) | (qw.scales == 0))).all():
        raise ValueError(f"scales: not representable in {scale_dtype}, range {qw.scales.aminmax()}")

    group_size = in_features if qw.scheme.group_size == PER_CHANNEL else qw.scheme.group_size
    return {
        _WEIGHT: pack_fields(codes, bits).t().contiguous(),
        _ZEROS: pack_fields((zero_points - first).t().to(torch.uint8), bits),
        _SCALES: scales.t().contiguous(),
        _G_IDX: torch.arange(in_features, dtype=torch.int32) // group_size if qw.g_idx is None else qw.g_idx,
    }


def _regex(pattern: str) -> str:
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


def _stored_in_features(qweight: torch.Tensor, g_idx: torch.Tensor | None, bits: int | None) -> int:
    if g_idx is not None:
        return g_idx.numel()
    if bits is None:
        raise ValueError("bits: neither the configuration nor the tensors tell; give (state_dict, config) with bits")
    return qweight.shape[0] * 32 // bits


def _infer_bits(qweight: torch.Tensor, in_features: int) -> int:
    for bits in BITS:
        if word_count(in_features, bits) == qweight.shape[0]:
            return bits
    expected = [[word_count(in_features, bits), "N"] for bits in BITS]
    raise ValueError(
        f"{_WEIGHT}: expected one of the shapes {expected} for in_features {in_features}, got {list(qweight.shape)}"
    )
