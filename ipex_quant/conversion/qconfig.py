"""Quantization configurations and the mappings that carry them: weight-only, SmoothQuant, static and dynamic."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch.ao.quantization import PlaceholderObserver, QConfig, QConfigMapping

from ..errors import ArgumentError
from ..numerics.affine import has_half_scales
from ..numerics.scheme import (
    PER_CHANNEL,
    QConfigWoq,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    check_group_size,
)
from ..observers import (
    HistogramObserver,
    PerChannelMinMaxObserver,
    SmoothQuantActivationObserver,
    SmoothQuantWeightObserver,
)

_TORCH_DTYPES: dict[Any, WoqWeightDtype] = {torch.qint8: WoqWeightDtype.INT8, torch.quint4x2: WoqWeightDtype.INT4}


class QConfigSmoothQuant(NamedTuple):
    """Configuration of SmoothQuant for linear layers.

    `activation` and `weight` make the observers. With `share_weight_observers`, linear layers of one parent that
    consume the same tensor have one smoothing factor, and so one quantized activation; else each has its own.
    """

    activation: Callable[[], Any]
    weight: Callable[[], Any]
    share_weight_observers: bool = True


DEFAULT_ACT_QUANT_MODE = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM


class QuantizationKind(Enum):
    """Kinds of quantization configurations."""

    WEIGHT_ONLY = "weight-only"
    SMOOTH_QUANT = "SmoothQuant"
    STATIC = "static"
    DYNAMIC = "dynamic"

    @property
    def needs_calibration(self) -> bool:
        return self in (QuantizationKind.STATIC, QuantizationKind.SMOOTH_QUANT)


def kind_of(qconfig: Any) -> QuantizationKind:
    """Kind of a configuration; TypeError for a configuration that is not supported."""
    if isinstance(qconfig, QConfigWoq):
        return QuantizationKind.WEIGHT_ONLY
    if isinstance(qconfig, QConfigSmoothQuant):
        return QuantizationKind.SMOOTH_QUANT
    if isinstance(qconfig, QConfig):
        observer = qconfig.activation()
        if not isinstance(observer, PlaceholderObserver):
            return QuantizationKind.STATIC
        if observer.is_dynamic:
            return QuantizationKind.DYNAMIC
    raise TypeError(
        "expected a weight-only, SmoothQuant, static or dynamic configuration, as get_*_qconfig_mapping and "
        f"default_*_qconfig make them, got {qconfig!r}"
    )


def needs_calibration(configure: Any) -> bool:
    """Whether a configuration, or any rule of a mapping, needs calibration to quantize activations."""
    rules = [configure]
    if isinstance(configure, QConfigMapping):
        by_rule = configure.object_type_qconfigs, configure.module_name_regex_qconfigs, configure.module_name_qconfigs
        rules = [configure.global_qconfig, *(qconfig for rule in by_rule for qconfig in rule.values())]
    kinds = (kind_of(rule) for rule in rules if isinstance(rule, (QConfig, QConfigSmoothQuant)))
    return any(kind.needs_calibration for kind in kinds)


def default_static_qconfig() -> QConfig:
    """IPEX's default for static quantization: histograms of activations, per-channel scales of weights."""
    return QConfig(activation=HistogramObserver.with_args(reduce_range=False), weight=_per_channel_weight())


def default_dynamic_qconfig() -> QConfig:
    """Dynamic quantization: one scale and zero point per token of activations, per-channel scales of weights."""
    dynamic = PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=True)
    return QConfig(activation=dynamic, weight=_per_channel_weight())


def get_smooth_quant_qconfig_mapping(
    alpha: float = 0.5,
    act_observer: Callable[[], Any] | None = None,
    act_ic_observer: Callable[[], Any] | None = None,
    wei_observer: Callable[[], Any] | None = None,
    wei_ic_observer: Callable[[], Any] | None = None,
    share_weight_observers: bool = True,
) -> QConfigMapping:
    """Mapping whose global configuration quantizes linear layers with SmoothQuant (Xiao et al. 2023).

    `alpha` in 0..1 is the share of the quantization difficulty that moves from activations to weights. The other
    arguments are factories of observers, ours or torch's: of whole activations (for layers that are not smoothed), of
    activations per input channel, of weights per output channel, and of weights per input channel. To set another alpha
    for some modules, pass the `global_qconfig` of a second mapping to ``set_module_name`` or ``set_module_name_regex``.
    Raises ValueError for an `alpha` outside 0..1, TypeError for one that is no number.
    """
    activation = SmoothQuantActivationObserver.with_args(
        alpha=alpha, act_observer=act_observer, act_ic_observer=act_ic_observer
    )
    weight = SmoothQuantWeightObserver.with_args(
        alpha=alpha, wei_observer=wei_observer, wei_ic_observer=wei_ic_observer
    )
    activation(), weight()  # bad arguments are refused here rather than by prepare
    return QConfigMapping().set_global(QConfigSmoothQuant(activation, weight, share_weight_observers))


def get_weight_only_quant_qconfig_mapping(
    *,
    weight_dtype: WoqWeightDtype = WoqWeightDtype.INT8,
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE,
    act_quant_mode: WoqActQuantMode = DEFAULT_ACT_QUANT_MODE,
    group_size: int = PER_CHANNEL,
    weight_qscheme: WoqWeightQScheme = WoqWeightQScheme.UNDEFINED,
    scale_dtype: torch.dtype = torch.float32,
) -> QConfigMapping:
    """Mapping whose global configuration quantizes the weight of every linear layer.

    `group_size` input features share one scale: a power of two, or -1 for one scale per output channel.
    `act_quant_mode` applies to ``lowp_mode=INT8`` only; without it, a mode that is not the default warns. An UNDEFINED
    `weight_qscheme` becomes SYMMETRIC for dtypes that are no integers and for INT8 weights computed in INT8, which have
    no zero points, and ASYMMETRIC otherwise. With `scale_dtype` float16, scales of weights that are rounded to nearest
    are numbers of it, where it has them as normal ones: IPEX's are float32. Raises ValueError for a value or a
    combination that does not exist.
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
        raise ArgumentError(
            f"Invalid weight data type for weight only quantization: {weight_dtype}; "
            f"expected one of {[each.name for each in WoqWeightDtype]}"
        )
    try:
        check_group_size(group_size)
    except ValueError:
        raise ArgumentError(f"Group size must be -1 or a positive power of 2, but got {group_size}") from None
    choices = {"lowp_mode": lowp_mode, "act_quant_mode": act_quant_mode, "weight_qscheme": weight_qscheme}
    for (name, value), enum in zip(choices.items(), (WoqLowpMode, WoqActQuantMode, WoqWeightQScheme), strict=True):
        if value not in enum.__members__.values():
            raise ValueError(f"{name}: expected one of {[str(each) for each in enum.__members__]}, got {value!r}")
    has_half_scales(scale_dtype)  # raises for another dtype
    weight_dtype, lowp_mode = WoqWeightDtype(weight_dtype), WoqLowpMode(lowp_mode)
    if lowp_mode != WoqLowpMode.INT8 and act_quant_mode not in (DEFAULT_ACT_QUANT_MODE, WoqActQuantMode.NONE):
        warnings.warn(
            f"act_quant_mode={WoqActQuantMode(act_quant_mode).name} has no effect: lowp_mode {lowp_mode.name} "
            "quantizes no activations; use WoqLowpMode.INT8",
            stacklevel=2,
        )
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
        scale_dtype=scale_dtype,
    )
    return QConfigMapping().set_global(qconfig)


def dynamic_experts_qconfig() -> QConfigWoq:
    """The equivalent of `default_dynamic_qconfig` for experts: INT8 weights with per-channel scales, and dynamic INT8
    activations with one scale and zero point per token.
    """
    return get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT8, lowp_mode=WoqLowpMode.INT8, act_quant_mode=WoqActQuantMode.PER_BATCH
    ).global_qconfig


def _per_channel_weight() -> Callable[[], Any]:
    return PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)


def _resolve_qscheme(
    qscheme: WoqWeightQScheme, weight_dtype: WoqWeightDtype, lowp_mode: WoqLowpMode
) -> WoqWeightQScheme:
    symmetric_only = not WoqWeightDtype(weight_dtype).has_integers or (
        weight_dtype == WoqWeightDtype.INT8 and lowp_mode == WoqLowpMode.INT8
    )
    if qscheme == WoqWeightQScheme.UNDEFINED:
        return WoqWeightQScheme.SYMMETRIC if symmetric_only else WoqWeightQScheme.ASYMMETRIC
    if qscheme == WoqWeightQScheme.ASYMMETRIC and symmetric_only:
        raise ArgumentError(
            f"Asymmetric quantization of weight is not supported when weight_dtype is {weight_dtype.name} "
            f"and lowp_mode is {lowp_mode.name}; use WoqWeightQScheme.SYMMETRIC or UNDEFINED"
        )
    return qscheme
