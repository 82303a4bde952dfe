"""`WeightOnlySpace`: which schemes, algorithms and compute modes a search may choose from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.ao.quantization import QConfigMapping

from ..conversion.qconfig import DEFAULT_ACT_QUANT_MODE, get_weight_only_quant_qconfig_mapping
from ..numerics.scheme import QConfigWoq, WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme

ALGORITHMS = ("gptq", "awq", "rtn")
"""Algorithms that a search tries unless others are named."""

SLOW_ALGORITHMS = ("auto_round",)
"""Algorithms that a search tries only where they are named: they take many times as long."""

INTEGERS = tuple(sorted((dtype for dtype in WoqWeightDtype if dtype.has_integers), key=lambda dtype: dtype.bits))
"""The dtypes of integers, smallest first."""


@dataclass(frozen=True)
class WeightOnlySpace:
    """The search space of weight-only quantization: all valid combinations of the fields.

    `algorithms` ("gptq", "awq", "rtn" or "auto_round") are tried in the order given; "auto_round" takes minutes for a
    trial, so that a quick one should come first. `lm_head` lists whether the output layer may be quantized (True), may
    stay in float (False), or both. With `embeddings`, embeddings get schemes too, and those that share their weight
    with the output layer the same one. With `mixed`, layers may get different schemes. Raises ValueError for an empty
    field and an unknown algorithm.
    """

    weight_dtypes: Sequence[WoqWeightDtype] = (WoqWeightDtype.INT4, WoqWeightDtype.INT8)
    group_sizes: Sequence[int] = (128, 64, 32, -1)
    qschemes: Sequence[WoqWeightQScheme] = (WoqWeightQScheme.ASYMMETRIC, WoqWeightQScheme.SYMMETRIC)
    algorithms: Sequence[str] = ALGORITHMS
    lowp_modes: Sequence[WoqLowpMode] = (WoqLowpMode.INT8,)
    act_quant_mode: WoqActQuantMode = DEFAULT_ACT_QUANT_MODE
    lm_head: Sequence[bool] = (True,)
    embeddings: bool = True
    mixed: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_dtypes", "group_sizes", "qschemes", "algorithms", "lowp_modes", "lm_head"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"quantization_config: {name}: expected at least one value in a list, got {values!r}")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        known = ALGORITHMS + SLOW_ALGORITHMS
        unknown = [name for name in self.algorithms if name not in known]
        if unknown:
            raise ValueError(f"quantization_config: algorithms: expected some of {', '.join(known)}, got {unknown}")

    @classmethod
    def of(cls, value: Any) -> WeightOnlySpace:
        """`value` if it is a space, the default space for None, or the space of a weight-only mapping.

        The space of a mapping has its global configuration alone. Raises TypeError for anything else.
        """
        if value is None or isinstance(value, WeightOnlySpace):
            return value or cls()
        qconfig = value.global_qconfig if isinstance(value, QConfigMapping) else value
        if not isinstance(qconfig, QConfigWoq):
            raise TypeError(
                "quantization_config: expected a WeightOnlySpace, or what get_weight_only_quant_qconfig_mapping makes, "
                f"got {type(value).__name__}"
            )
        return cls(
            weight_dtypes=(qconfig.weight_dtype,),
            group_sizes=(qconfig.group_size,),
            qschemes=(qconfig.weight_qscheme,),
            lowp_modes=(qconfig.lowp_mode,),
            act_quant_mode=qconfig.act_quant_mode,
            embeddings=False,
        )

    def schemes(self, lowp_mode: WoqLowpMode) -> list[WeightScheme]:
        """All schemes that can be computed in `lowp_mode`; ValueError if there is none."""
        found: dict[WeightScheme, None] = {}
        for dtype, group_size, qscheme in itertools.product(self.weight_dtypes, self.group_sizes, self.qschemes):
            with suppress(ValueError):  # no such combination
                found[self._qconfig(dtype, group_size, qscheme, lowp_mode).scheme] = None
        if not found:
            raise ValueError(f"quantization_config: none of its combinations exists for lowp_mode {lowp_mode.name}")
        return list(found)

    def quantizes_activations(self, lowp_mode: WoqLowpMode) -> bool:
        """Whether layers that compute in `lowp_mode` quantize their inputs."""
        return lowp_mode == WoqLowpMode.INT8 and self.act_quant_mode != WoqActQuantMode.NONE

    def _qconfig(
        self, dtype: WoqWeightDtype, group_size: int, qscheme: WoqWeightQScheme, lowp_mode: WoqLowpMode
    ) -> QConfigWoq:
        return layer_qconfig(dtype, group_size, qscheme, lowp_mode, self.act_quant_mode)


def layer_qconfig(
    dtype: WoqWeightDtype,
    group_size: int,
    qscheme: WoqWeightQScheme,
    lowp_mode: WoqLowpMode,
    act_quant_mode: WoqActQuantMode,
) -> QConfigWoq:
    """The configuration of one layer; ValueError for a combination that does not exist."""
    # Other compute modes than INT8 quantize no activations; a mapping with one has the mode NONE.
    quantizes = lowp_mode == WoqLowpMode.INT8 and act_quant_mode != WoqActQuantMode.NONE
    return get_weight_only_quant_qconfig_mapping(
        weight_dtype=dtype,
        group_size=group_size,
        weight_qscheme=qscheme,
        lowp_mode=lowp_mode,
        act_quant_mode=act_quant_mode if quantizes else DEFAULT_ACT_QUANT_MODE,
    ).global_qconfig
