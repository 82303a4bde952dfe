"""`Recipe`: one way to quantize a model, read from YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import yaml

from ..quantization import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    get_weight_only_quant_qconfig_mapping,
)
from . import FOLDER, recipe_names

ALGORITHMS = ("rtn", "gptq")
BITS = {WoqWeightDtype.INT4: 4, WoqWeightDtype.INT8: 8}


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ calibrates: `samples` windows of `sequence_length` tokens; `percdamp` damps the Hessian's diagonal."""

    act_order: bool = False
    percdamp: float = 0.01
    samples: int = 64
    sequence_length: int = 512


@dataclass(frozen=True)
class Recipe:
    """One way to quantize a model. `skip` holds regular expressions of the names of modules that stay in float."""

    name: str
    description: str = ""
    algorithm: str = "rtn"
    weight_dtype: WoqWeightDtype = WoqWeightDtype.INT8
    weight_qscheme: WoqWeightQScheme = WoqWeightQScheme.UNDEFINED
    group_size: int = -1
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
    skip: tuple[str, ...] = ()
    gptq: GptqSettings = field(default_factory=GptqSettings)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if self.algorithm == "gptq" and self.weight_dtype not in BITS:
            raise ValueError(f"weight_dtype: gptq writes int4 or int8 weights, got {self.weight_dtype.name.lower()}")
        self.qconfig_mapping()

    def qconfig_mapping(self) -> Any:
        """The quantization configuration that `llm.optimize` and `quantization.prepare` take."""
        mapping = get_weight_only_quant_qconfig_mapping(
            weight_dtype=self.weight_dtype,
            weight_qscheme=self.weight_qscheme,
            group_size=self.group_size,
            lowp_mode=self.lowp_mode,
            act_quant_mode=self.act_quant_mode,
        )
        for pattern in self.skip:
            mapping.set_module_name_regex(pattern, None)
        return mapping


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The packaged recipe of that name, or the one in that YAML file.

    Raises ValueError, which names the recipe, for an unknown name, an unknown key or a value that does not fit.
    """
    path = FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in recipe_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"recipe: expected a file or one of {', '.join(recipe_names())}, got {str(name_or_path)!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Recipe(name=path.stem, **_parsed(content, _RECIPE_KEYS))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path.stem}: {error}") from error


def _parsed(content: object, keys: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"expected keys and values, got {type(content).__name__}")
    if unknown := [key for key in content if key not in keys]:
        raise ValueError(f"unknown key {unknown[0]!r}, expected some of {', '.join(keys)}")
    parsed = {}
    for key, value in content.items():
        try:
            parsed[key] = keys[key](value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return parsed


def _of_type(kind: type) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        # bool is an int in Python, but `samples: true` is a mistake; an int is a fine float.
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, kind) if kind is float else kind):
            raise ValueError(f"expected {kind.__name__}, got {value!r}")
        return value

    return parse


def _positive(value: Any) -> int:
    if _of_type(int)(value) < 1:
        raise ValueError(f"expected at least 1, got {value}")
    return value


def _member_of(enum: type[IntEnum]) -> Callable[[Any], IntEnum]:
    names = {member.name.lower(): member for member in enum}

    def parse(value: Any) -> IntEnum:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"expected one of {', '.join(names)}, got {value!r}")
        return names[value]

    return parse


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a list of strings, got {value!r}")
    return tuple(value)


_GPTQ_KEYS: dict[str, Callable[[Any], Any]] = {
    "act_order": _of_type(bool),
    "percdamp": _of_type(float),
    "samples": _positive,
    "sequence_length": _positive,
}

_RECIPE_KEYS: dict[str, Callable[[Any], Any]] = {
    "description": _of_type(str),
    "algorithm": _of_type(str),
    "weight_dtype": _member_of(WoqWeightDtype),
    "weight_qscheme": _member_of(WoqWeightQScheme),
    "group_size": _of_type(int),
    "lowp_mode": _member_of(WoqLowpMode),
    "act_quant_mode": _member_of(WoqActQuantMode),
    "skip": _strings,
    "gptq": lambda value: GptqSettings(**_parsed(value, _GPTQ_KEYS)),
}
