"""Configurations of weight-only quantization: `QConfigWoq` and the mapping that carries it."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch.ao.quantization import PlaceholderObserver, QConfigMapping

from ..numerics.scheme import (
    PER_CHANNEL,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    check_group_size,
)

_TORCH_DTYPES = {torch.qint8: WoqWeightDtype.INT8, torch.quint4x2: WoqWeightDtype.INT4}


class QConfigWoq(NamedTuple):
    """How the weight of a linear layer is quantized and what it is computed with.

    `activation` and `weight` are placeholders, as torch's own QConfig has them; `cache_weight_for_large_batch` is kept
    for old code, the kernels need no second copy of a weight.
    """

    activation: Any
    weight: Any
    lowp_mode: WoqLowpMode
    act_quant_mode: WoqActQuantMode
    weight_dtype: WoqWeightDtype
    group_size: int
    cache_weight_for_large_batch: bool
    weight_qscheme: WoqWeightQScheme


def get_weight_only_quant_qconfig_mapping(
    *,
    weight_dtype: WoqWeightDtype = WoqWeightDtype.INT8,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM,
    group_size: int = PER_CHANNEL,
    weight_qscheme: WoqWeightQScheme = WoqWeightQScheme.UNDEFINED,
) -> QConfigMapping:
    """Mapping whose global configuration quantizes the weight of every linear layer.

    `group_size` input features share one scale: a power of two, or -1 for one scale per output channel.
    `act_quant_mode` counts with ``lowp_mode=INT8`` only. An UNDEFINED `weight_qscheme` becomes SYMMETRIC for NF4, FP8
    and for INT8 weights computed in INT8, which have no zero points, and ASYMMETRIC otherwise. Raises ValueError for a
    value or a combination that does not exist.
    """
    if weight_dtype in _TORCH_DTYPES:
        named = _TORCH_DTYPES[weight_dtype]
        warnings.warn(
            f"weight_dtype={weight_dtype} is deprecated, use WoqWeightDtype.{named.name}",
            DeprecationWarning,
            stacklevel=2,
        )
        weight_dtype = named
    if weight_dtype not in WoqWeightDtype.__members__.values():
        raise ValueError(
            f"Invalid weight data type for weight only quantization: {weight_dtype}; "
            f"expected one of {[each.name for each in WoqWeightDtype]}"
        )
    try:
        check_group_size(group_size)
    except ValueError:
        raise ValueError(f"Group size must be -1 or a positive power of 2, but got {group_size}") from None
    choices = {"lowp_mode": lowp_mode, "act_quant_mode": act_quant_mode, "weight_qscheme": weight_qscheme}
    for (name, value), enum in zip(choices.items(), (WoqLowpMode, WoqActQuantMode, WoqWeightQScheme), strict=True):
        if value not in enum.__members__.values():
            raise ValueError(f"{name}: expected one of {[str(each) for each in enum.__members__]}, got {value!r}")
    weight_dtype, lowp_mode = WoqWeightDtype(weight_dtype), WoqLowpMode(lowp_mode)
    act_quant_mode = WoqActQuantMode(act_quant_mode) if lowp_mode == WoqLowpMode.INT8 else WoqActQuantMode.NONE
    if lowp_mode == WoqLowpMode.INT8 and act_quant_mode == WoqActQuantMode.NONE:
        raise ValueError("act_quant_mode: lowp_mode INT8 quantizes activations, expected a mode for it, got NONE")
    qconfig = QConfigWoq(
        activation=PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=False),
        weight=PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=False),
        lowp_mode=lowp_mode,
        act_quant_mode=act_quant_mode,
        weight_dtype=weight_dtype,
        group_size=group_size,
        cache_weight_for_large_batch=False,
        weight_qscheme=_resolve_qscheme(WoqWeightQScheme(weight_qscheme), weight_dtype, lowp_mode),
    )
    return QConfigMapping().set_global(qconfig)


def _resolve_qscheme(
    qscheme: WoqWeightQScheme, weight_dtype: WoqWeightDtype, lowp_mode: WoqLowpMode
) -> WoqWeightQScheme:
    symmetric_only = weight_dtype in (WoqWeightDtype.NF4, WoqWeightDtype.FP8) or (
        weight_dtype == WoqWeightDtype.INT8 and lowp_mode == WoqLowpMode.INT8
    )
    if qscheme == WoqWeightQScheme.UNDEFINED:
        return WoqWeightQScheme.SYMMETRIC if symmetric_only else WoqWeightQScheme.ASYMMETRIC
    if qscheme == WoqWeightQScheme.ASYMMETRIC and symmetric_only:
        raise ValueError(
            f"Asymmetric quantization of weight is not supported when weight_dtype is {weight_dtype.name} "
            f"and lowp_mode is {lowp_mode.name}; use WoqWeightQScheme.SYMMETRIC or UNDEFINED"
        )
    return qscheme
