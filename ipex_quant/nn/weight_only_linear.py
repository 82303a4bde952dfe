"""`WeightOnlyQuantizedLinear`: a linear layer that holds its weight packed, in 2 to 8 bits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import ArgumentError
from ..numerics import affine
from ..numerics.quantized_weight import QuantizedWeight, code_dtype
from ..numerics.saved_weight import FACTORS, SAVED_NAMES, saved_places, saved_weight, to_saved
from ..numerics.scheme import (
    PER_CHANNEL,
    QConfigWoq,
    WeightScheme,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
)
from .linears import PackedLinear, linear_shape, weight_matrix
from .op_context import OpContext
from .quantized_module import Placeholder, QuantizedModule, autocast, check_bias, flag
from .weight_tensors import QuantDtype, QuantMethod, WoqWeightFormat, read_tensors

SCHEME_ENTRY = ("weight_dtype", "symmetric", "group_size", "act_order")
"""Keys that describe a weight's scheme in saved configurations."""

OPTIONAL_ENTRY = frozenset(("minimums", "super_group_size"))
"""Keys of `scheme_entry` that only some schemes have."""


class WeightOnlyQuantizedLinear(QuantizedModule, PackedLinear):
    """``y = x @ dequantize(weight).T + bias`` with a packed weight ``[out_features, in_features]``.

    `x` is float32, bfloat16 or float16 ``[..., in_features]`` on the CPU; the result ``[..., out_features]`` has its
    dtype, or autocast's under torch.autocast. Only `x` has a gradient. Values written to the whole `weight` are
    quantized by rounding to nearest, in the weight's scheme, but with zero points for minimums and plain scales for
    those with super scales. The state dict holds the tensors of `saved_weight`, and `bias` in float32, each if there is
    one; saving unpacks the weight and loading packs it. The constructor makes a module without a weight,
    whose scheme `load_state_dict` infers from the tensors; `from_float` and `from_quantized_weight` make one with a
    weight. Raises RuntimeError when called without a weight or moved off the CPU.
    """

    kind = "weight_only"
    entry_names = frozenset((*SCHEME_ENTRY, "bias", "lowp_mode", "act_quant_mode"))
    optional_entry_names = OPTIONAL_ENTRY
    weight_names = SAVED_NAMES

    def __init__(
        self, in_features: int, out_features: int, bias_: bool = True, dtype: WoqWeightDtype = WoqWeightDtype.INT8
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._has_bias = bias_
        self.dtype = WoqWeightDtype(dtype)
        self.scheme: WeightScheme | None = None
        self.lowp_mode = WoqLowpMode.NONE
        self.act_quant_mode = WoqActQuantMode.NONE
        self.register_buffer("_packed", None, persistent=False)
        self.register_buffer("_perm", None, persistent=False)
        self.register_buffer("_bias", None, persistent=False)

    @classmethod
    def from_quantized_weight(
        cls,
        qw: QuantizedWeight,
        bias: torch.Tensor | None = None,
        lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
        act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE,
    ) -> WeightOnlyQuantizedLinear:
        """Pack `qw`, with a float `bias` ``[out_features]``; ValueError when the bias has another shape."""
        out_features, in_features = qw.shape
        module = cls(in_features, out_features, bias is not None, qw.scheme.dtype)
        module.lowp_mode = WoqLowpMode(lowp_mode)
        module.act_quant_mode = WoqActQuantMode(act_quant_mode)
        module._set_weight(qw)
        module._set_bias(bias)
        return module

    @classmethod
    def from_float(
        cls, mod: nn.Module, scales: torch.Tensor | None = None, zero_points: torch.Tensor | None = None
    ) -> nn.Module:
        """Quantize the linear layer `mod` as its attribute `qconfig`, a `QConfigWoq`, says.

        `scales` and `zero_points`, ``[out_features]`` or ``[out_features, groups]``, are computed from the weight
        unless given. A bias of zeros is dropped. Returns `mod` itself when its qconfig is not a weight-only one. Raises
        ValueError when it has none, or when the weight holds NaN or Inf.
        """
        qconfig = getattr(mod, "qconfig", None)
        if qconfig is None:
            raise ValueError("mod.qconfig: expected a QConfigWoq, got none; run prepare() or set it")
        if not isinstance(qconfig, QConfigWoq):
            return mod
        weight = weight_matrix(mod)
        scheme = qconfig.scheme
        if scales is None:
            qw = ops.quantize_weight(weight, scheme, qconfig.scale_dtype)
        else:
            rows = len(weight)
            zero_points = None if zero_points is None else zero_points.reshape(rows, -1).to(torch.int16)
            qw = affine.quantize(weight, scheme, scales.reshape(rows, -1).float(), zero_points)
        return cls.replacing(mod, qw)

    @classmethod
    def replacing(cls, linear: nn.Module, qw: QuantizedWeight) -> WeightOnlyQuantizedLinear:
        """Make a layer with the weight `qw` to replace the linear layer `linear`, whose weight gives the float dtype.

        The compute mode is that of ``linear.qconfig`` if there is one. A bias of zeros is dropped.
        """
        bias = linear.bias if linear.bias is not None and linear.bias.any() else None
        return cls._like(linear, qw, bias).to(linear.weight.dtype)

    @classmethod
    def from_float_and_qweight(
        cls,
        mod: nn.Module,
        qweight: torch.Tensor,
        dtype: WoqWeightDtype,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        group_size: int = PER_CHANNEL,
        g_idx: torch.Tensor | None = None,
        weight_format: WoqWeightFormat = WoqWeightFormat.PLAIN_FORMAT,
    ) -> WeightOnlyQuantizedLinear:
        """Make a layer of quantized tensors to replace the linear layer `mod`, whose weight is not read.

        Layouts are those of `read_tensors`. `bias` defaults to the bias of `mod`. The compute mode is that of
        ``mod.qconfig`` if there is one. Raises ValueError or TypeError for tensors that do not fit.
        """
        tensors = {"qweight": qweight, "scales": scales, "zero_points": zero_points, "g_idx": g_idx}
        shape = (mod.out_features, mod.in_features)
        qw = read_tensors(tensors, WoqWeightDtype(dtype), shape, group_size, WoqWeightFormat(weight_format))
        return cls._like(mod, qw, mod.bias if bias is None else bias)

    @classmethod
    def from_float_and_int4_weight(
        cls,
        mod: nn.Module,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        group_size: int = PER_CHANNEL,
        g_idx: torch.Tensor | None = None,
        weight_format: WoqWeightFormat = WoqWeightFormat.PLAIN_FORMAT,
    ) -> WeightOnlyQuantizedLinear:
        """`from_float_and_qweight` with INT4 codes."""
        return cls.from_float_and_qweight(
            mod, qweight, WoqWeightDtype.INT4, scales, zero_points, bias, group_size, g_idx, weight_format
        )

    @classmethod
    def from_int4_weight(
        cls,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        in_features: int,
        out_features: int,
        quant_method: QuantMethod,
        qconfig: Any = None,
        bias: torch.Tensor | None = None,
        group_size: int = PER_CHANNEL,
        g_idx: torch.Tensor | None = None,
    ) -> WeightOnlyQuantizedLinear:
        """Make a layer of an INT4 checkpoint's tensors, in the layout of `quant_method`.

        `qconfig` (a `QConfigWoq` or a mapping with a global one) sets the compute mode; None is BF16. AWQ tensors tell
        their shape, which counts, with a warning, if `in_features` or `out_features` are other numbers, as in IPEX.
        Raises ValueError or TypeError for tensors that do not fit the shape or each other.
        """
        formats = {QuantMethod.GPTQ_GEMM: WoqWeightFormat.GPTQ_FORMAT, QuantMethod.AWQ_GEMM: WoqWeightFormat.AWQ_FORMAT}
        tensors = {"qweight": qweight, "scales": scales, "zero_points": zero_points, "g_idx": g_idx}
        weight_format = formats[QuantMethod(quant_method)]
        shape = (out_features, in_features)
        if weight_format == WoqWeightFormat.AWQ_FORMAT and scales.dim() == qweight.dim() == 2:
            stored = (scales.shape[1], qweight.shape[0])
            if stored != shape:
                warnings.warn(f"expected tensors of a weight {shape}, they hold one of {stored}", stacklevel=2)
            shape = stored
        qw = read_tensors(tensors, WoqWeightDtype.INT4, shape, group_size, weight_format)
        module = cls.from_quantized_weight(qw, bias, WoqLowpMode.BF16)
        module._set_compute(getattr(qconfig, "global_qconfig", qconfig))
        return module

    @classmethod
    def from_weight(
        cls,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        in_features: int,
        out_features: int,
        qconfig: Any = None,
        bias: torch.Tensor | None = None,
        group_size: int = PER_CHANNEL,
        g_idx: torch.Tensor | None = None,
        quant_method: QuantMethod = QuantMethod.GPTQ_GEMM,
        dtype: QuantDtype = QuantDtype.INT4,
        **kwargs: Any,
    ) -> WeightOnlyQuantizedLinear:
        """`from_int4_weight` with IPEX's other order of arguments; further keywords are ignored, as IPEX does."""
        if quant_method not in [*QuantMethod] or dtype not in [*QuantDtype]:
            raise ArgumentError(f"from_weight supports 4bits with AWQ or GPTQ, got {quant_method} and {dtype}")
        shape = (in_features, out_features)
        return cls.from_int4_weight(
            qweight, scales, zero_points, *shape, quant_method, qconfig, bias, group_size, g_idx
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_fused(x, ops.PostOp.NONE)

    def forward_fused(self, x: torch.Tensor, post_op: ops.PostOp, *others: torch.Tensor) -> torch.Tensor:
        """Run the layer and `post_op` in one call; `others`, ``[..., out_features]``, are the post op's operands."""
        if self._packed is None:
            raise RuntimeError("WeightOnlyQuantizedLinear has no weight yet; load a state dict or use from_float")
        x, *others = map(autocast, (x, *others))
        return ops.woq_linear(
            x,
            self._packed,
            self.out_features,
            bias=self._bias,
            perm=self._perm,
            lowp_mode=self.lowp_mode,
            act_quant_mode=self.act_quant_mode,
            post_op=post_op,
            others=others,
        )

    def quantized_weight(self) -> QuantizedWeight:
        """The plain form of the weight, unpacked into new tensors; RuntimeError when there is none."""
        if self._packed is None:
            raise RuntimeError("WeightOnlyQuantizedLinear has no weight yet; load a state dict or use from_float")
        shape = (self.out_features, self.in_features)
        return ops.unpack_weight(ops.PackedWeight(self._packed, self._perm, self.scheme, shape))

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds: packed weight, bias and input permutation."""
        return sum(b.numel() * b.element_size() for b in (self._packed, self._bias, self._perm) if b is not None)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The saved tensors of `quantized_weight` and the bias by name, each if there is one."""
        return self._saved_weight() | ({} if self._bias is None else {"bias": self._bias})

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight ``[out_features, in_features]`` in a new tensor; RuntimeError when there is none."""
        return affine.dequantize(self.quantized_weight(), dtype)

    def _set_values(self, weight: torch.Tensor) -> None:
        self._set_weight(_quantized_as(self.quantized_weight(), weight))

    def describe(self) -> dict[str, Any]:
        """Scheme, compute mode, and which optional tensors there are."""
        return {
            **scheme_entry(self.scheme),
            "act_order": self._perm is not None,
            "bias": self._bias is not None,
            "lowp_mode": self.lowp_mode.name.lower(),
            "act_quant_mode": self.act_quant_mode.name.lower(),
        }

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder of the scheme in `entry` for the linear layer `module`; ValueError for an invalid entry."""
        scheme, _ = read_scheme(entry), read_modes(entry)
        shape = linear_shape(module)
        bias = (torch.float32, shape[:1]) if flag(entry, "bias") else None
        return Placeholder(shape, entry, saved_places(scheme, shape, flag(entry, "act_order")) | {"bias": bias})

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[WeightOnlyQuantizedLinear]:
        """Make one module of each placeholder; ValueError or TypeError for tensors that do not fit the scheme."""
        modules = []
        for place in loaded:
            tensors = place.tensors
            bias = tensors.pop("bias")
            qw = saved_weight(tensors, read_scheme(place.entry), place.shape)
            modules.append(cls.from_quantized_weight(qw, bias, *read_modes(place.entry)))
        return modules

    @property
    def group_size(self) -> int:
        return PER_CHANNEL if self.scheme is None else self.scheme.group_size

    @property
    def _op_context(self) -> OpContext:
        return OpContext(self.quantized_weight(), self.bias)

    @property
    def _weight_qscheme(self) -> WoqWeightQScheme:
        if self.scheme is None:
            return WoqWeightQScheme.UNDEFINED
        return self.scheme.qscheme

    def extra_repr(self) -> str:
        fields = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype.name.lower(),
            "bias": self._has_bias,
            "lowp_mode": self.lowp_mode.name.lower(),
            "act_quant_mode": self.act_quant_mode.name.lower(),
            "group_size": self.group_size,
            "weight_qscheme": self._weight_qscheme.name.lower(),
        }
        return ", ".join(f"{name}={value}" for name, value in fields.items())

    @classmethod
    def _like(cls, mod: nn.Module, qw: QuantizedWeight, bias: torch.Tensor | None) -> WeightOnlyQuantizedLinear:
        module = cls.from_quantized_weight(qw, bias)
        module._set_compute(getattr(mod, "qconfig", None))
        return module.train(mod.training)

    def _set_compute(self, qconfig: Any) -> None:
        if qconfig is not None:
            self.lowp_mode = WoqLowpMode(qconfig.lowp_mode)
            self.act_quant_mode = WoqActQuantMode(qconfig.act_quant_mode)

    def _set_weight(self, qw: QuantizedWeight) -> None:
        packed = ops.pack_weight(qw)
        self.dtype, self.scheme = qw.scheme.dtype, qw.scheme
        self._packed, self._perm = packed.data, packed.perm

    def _set_bias(self, bias: torch.Tensor | None) -> None:
        self._bias = None if bias is None else check_bias(bias, self.out_features)
        self._has_bias = bias is not None

    def _float_bias(self) -> torch.Tensor | None:
        return self._bias

    def _traced_weight(self) -> torch.Tensor:
        return ops.woq_dequantize(self._packed, self._perm, *self.weight_shape, self._float.dtype)

    def _expected_names(self, given: dict[str, torch.Tensor]) -> list[str]:
        if self.scheme is None:
            needed = ("codes", FACTORS["scales"] if "super_scales" in given else "scales")
            names = [name for name in SAVED_NAMES if name in given or name in needed]
        else:
            places = saved_places(self.scheme, self.weight_shape, self._perm is not None)
            names = [name for name, place in places.items() if place is not None]
        return [*names, "bias"] if self._has_bias else names

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        self._set_weight(saved_weight(tensors, self.scheme or self._find_scheme(tensors), self.weight_shape))

    def _find_scheme(self, tensors: dict[str, torch.Tensor]) -> WeightScheme:
        """Infer the scheme of a plain weight: only one power of two as group size gives the number of groups."""
        if tensors["codes"].dtype != code_dtype(self.dtype):
            raise TypeError(
                f"codes: {self.dtype.name} has {code_dtype(self.dtype)}, got {tensors['codes'].dtype}; "
                "give the module the right dtype"
            )
        supers = tensors.get("super_scales")
        super_size = None if supers is None else self._size_of("super_scales", supers)
        scales = "scales" if supers is None else FACTORS["scales"]
        size = self._size_of(scales, tensors[scales])
        minimums = not {"minimums", FACTORS["minimums"]}.isdisjoint(tensors)
        return WeightScheme(self.dtype, "zero_points" not in tensors and not minimums, size, minimums, super_size)

    def _size_of(self, name: str, factors: torch.Tensor) -> int:
        """The group size that gives as many groups as there are `factors` in a row."""
        groups = factors.shape[-1]
        for size in [PER_CHANNEL] + [1 << bit for bit in range(max(self.in_features - 1, 1).bit_length())]:
            if WeightScheme(self.dtype, group_size=size).group_count(self.in_features) == groups:
                return size
        raise ValueError(f"{name}: no group size divides {self.in_features} input features into {groups} groups")

    def _saved_weight(self) -> dict[str, torch.Tensor]:
        return {} if self._packed is None else to_saved(self.quantized_weight())

    def __getstate__(self) -> dict[str, Any]:
        # Pickles may be read by another machine or version, so they hold the saved weight.
        buffers = {**self._buffers, "_packed": None, "_perm": None}
        return {**self.__dict__, "_buffers": buffers, "_saved": self._saved_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved")
        super().__setstate__(state)
        if saved:
            self._load_weight(saved)


def _quantized_as(qw: QuantizedWeight, weight: torch.Tensor) -> QuantizedWeight:
    """Quantize `weight` by rounding to nearest, with the dtype and the groups of `qw`."""
    scheme = WeightScheme(qw.scheme.dtype, qw.scheme.symmetric, qw.scheme.group_size)
    if qw.g_idx is None:
        return ops.quantize_weight(weight, scheme)
    order = qw.g_idx.argsort(stable=True)
    grouped = ops.quantize_weight(weight[:, order], scheme)
    codes = affine.plain_codes(affine.stored_codes(grouped)[:, order.argsort()], scheme.dtype)
    return replace(grouped, codes=codes, g_idx=qw.g_idx)


def scheme_entry(scheme: WeightScheme) -> dict[str, Any]:
    """The scheme in a saved configuration's entry, which `read_scheme` reads."""
    entry: dict[str, Any] = {
        "weight_dtype": scheme.dtype.name.lower(),
        "symmetric": scheme.symmetric,
        "group_size": scheme.group_size,
    }
    if scheme.minimums:
        entry["minimums"] = True
    if scheme.super_group_size is not None:
        entry["super_group_size"] = scheme.super_group_size
    return entry


def read_scheme(entry: dict[str, Any]) -> WeightScheme:
    """Read the scheme from a saved configuration's entry; ValueError or TypeError for an invalid one."""
    return WeightScheme(
        _member(WoqWeightDtype, entry["weight_dtype"]),
        flag(entry, "symmetric"),
        entry["group_size"],
        "minimums" in entry and flag(entry, "minimums"),
        entry.get("super_group_size"),
    )


def read_modes(entry: dict[str, Any]) -> tuple[WoqLowpMode, WoqActQuantMode]:
    """Read compute and activation mode from a saved configuration's entry; ValueError for an invalid combination."""
    lowp_mode = _member(WoqLowpMode, entry["lowp_mode"])
    act_quant_mode = _member(WoqActQuantMode, entry["act_quant_mode"])
    if lowp_mode == WoqLowpMode.INT8 and act_quant_mode == WoqActQuantMode.NONE:
        raise ValueError("lowp_mode int8 quantizes activations, got act_quant_mode none")
    return lowp_mode, act_quant_mode


def _member(enum: type[IntEnum], name: Any) -> Any:
    names = {member.name.lower(): member for member in enum}
    if name not in names:
        raise ValueError(f"expected one of {list(names)}, got {name!r}")
    return names[name]
