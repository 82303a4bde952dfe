"""`Recipe`: one way to quantize a model, read from YAML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from torch import nn
from torch.ao.quantization import QConfigMapping

from .. import quantization
from ..nn.linears import holds_experts, is_linear, linear_shape, output_head
from ..nn.multihead_attention import named_layers
from ..observers import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from ..quantization import (
    AwqOptions,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)
from ..woq.gptq import BITS
from . import FOLDER, recipe_names
from .fields import Count, Fraction, Regex, parse

SMALLEST_GROUP = 32

OBSERVERS = {
    "histogram": HistogramObserver.with_args(reduce_range=False),
    "min_max": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
}
"""What finds the range of an activation, by its name in a recipe."""


class Settings:
    """What an algorithm needs to know; the fields of each kind are the keys of its recipes."""

    def qconfig(self) -> Any:
        """Configuration of every layer but the exceptions."""
        raise NotImplementedError

    def exceptions(self) -> dict[str, Any]:
        """Configurations of the layers whose name matches a regular expression; the first match counts."""
        return {}

    def types(self) -> dict[type[nn.Module], Any]:
        """Configurations of modules that are quantized only where their type is given."""
        return {}

    def exceptions_of(self, model: nn.Module) -> dict[str, Any]:
        """Configurations of layers of `model`, by name, that depend on their shape and place."""
        return {}


@dataclass(frozen=True)
class Calibrated(Settings):
    """Settings of an algorithm that looks at `samples` windows of `sequence_length` tokens."""

    samples: Count = 128
    sequence_length: Count = 512


@dataclass(frozen=True)
class WeightOnly(Settings):
    """Weights in few bits, rounded to nearest; `lowp_mode` and `act_quant_mode` say what they are computed with.

    A layer with fewer than `min_groups` groups a row, or whose width `group_size` does not divide, has smaller groups,
    of 32 features at least: rounding errors of narrow layers average out less. `head_dtype` is that of the output
    layer's weight, per channel, where it is not `weight_dtype`; `embedding_dtype` that of the embeddings' tables, a
    scale a row, which stay in float without it.
    """

    weight_dtype: WoqWeightDtype = WoqWeightDtype.INT8
    weight_qscheme: WoqWeightQScheme = WoqWeightQScheme.UNDEFINED
    group_size: int = -1
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
    min_groups: int = 0
    head_dtype: WoqWeightDtype | None = None
    embedding_dtype: WoqWeightDtype | None = None

    def qconfig(self) -> Any:
        return self._with()

    def exceptions_of(self, model: nn.Module) -> dict[str, Any]:
        widths = layer_widths(model)
        sizes = {name: self.group_size_for(width) for name, width in widths.items()}
        found = {name: self._with(group_size=size) for name, size in sizes.items() if size != self.group_size}
        head = output_head(model)
        if self.head_dtype is not None and head is not None:
            found[head] = self._per_channel(self.head_dtype)
        return found

    def types(self) -> dict[type[nn.Module], Any]:
        return {} if self.embedding_dtype is None else {nn.Embedding: self._per_channel(self.embedding_dtype)}

    def group_size_for(self, width: int) -> int:
        """Input features that share a scale in a layer with `width` of them."""
        size = self.group_size
        while self.min_groups and size > SMALLEST_GROUP and (width % size or width < self.min_groups * size):
            size //= 2
        return size

    def _per_channel(self, dtype: WoqWeightDtype) -> Any:
        return self._with(weight_dtype=dtype, group_size=-1, weight_qscheme=WoqWeightQScheme.UNDEFINED)

    def _with(self, **changes: Any) -> Any:
        names = ("weight_dtype", "weight_qscheme", "group_size", "lowp_mode", "act_quant_mode")
        settings = {name: getattr(self, name) for name in names} | changes
        return get_weight_only_quant_qconfig_mapping(**settings).global_qconfig


@dataclass(frozen=True)
class Gptq(WeightOnly, Calibrated):
    """As `WeightOnly`, with the weights in transformer blocks rounded by GPTQ; `percdamp` damps the Hessian."""

    samples: Count = 64
    act_order: bool = False
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        if self.weight_dtype not in BITS:
            raise ValueError(f"weight_dtype: gptq writes int4 or int8 weights, got {self.weight_dtype.name.lower()}")


@dataclass(frozen=True)
class Awq(WeightOnly, Calibrated):
    """As `WeightOnly`, with the weights in transformer blocks scaled and clipped by AWQ, as `AwqOptions` says."""

    samples: Count = 64
    alpha_steps: int = AwqOptions.alpha_steps
    clip_steps: int = AwqOptions.clip_steps
    lowest_clip: float = AwqOptions.lowest_clip
    tokens: int = AwqOptions.tokens

    def __post_init__(self) -> None:
        self.options()

    def options(self) -> AwqOptions:
        """How AWQ searches."""
        return AwqOptions(**{each.name: getattr(self, each.name) for each in fields(AwqOptions)})


@dataclass(frozen=True)
class Dynamic(Settings):
    """INT8 weights per channel; activations are quantized as they come, each token on its own."""

    def qconfig(self) -> Any:
        return quantization.default_dynamic_qconfig


@dataclass(frozen=True)
class Static(Calibrated):
    """INT8 weights per channel; one of `OBSERVERS` finds a range for every activation."""

    observer: str = "histogram"

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer: expected one of {', '.join(OBSERVERS)}, got {self.observer!r}")

    def qconfig(self) -> Any:
        return quantization.default_static_qconfig._replace(activation=OBSERVERS[self.observer])


@dataclass(frozen=True)
class SmoothQuant(Calibrated):
    """As `Static`, with outliers moved from activations to weights: by `alpha`, or the first of `alphas` that matches.

    With `share_weight_observers` layers that read the same tensor share one smoothing factor.
    """

    alpha: Fraction = 0.5
    alphas: dict[Regex, Fraction] = field(default_factory=dict)
    share_weight_observers: bool = True

    def qconfig(self) -> Any:
        return self._with(self.alpha)

    def exceptions(self) -> dict[str, Any]:
        return {pattern: self._with(alpha) for pattern, alpha in self.alphas.items()}

    def _with(self, alpha: float) -> Any:
        mapping = get_smooth_quant_qconfig_mapping(alpha, share_weight_observers=self.share_weight_observers)
        return mapping.global_qconfig


ALGORITHMS: dict[str, type[Settings]] = {
    "rtn": WeightOnly,
    "gptq": Gptq,
    "awq": Awq,
    "smoothquant": SmoothQuant,
    "static": Static,
    "dynamic": Dynamic,
}


@dataclass(frozen=True)
class Recipe:
    """One way to quantize a model. `skip` holds regular expressions of the names of modules that stay in float."""

    name: str
    settings: Settings
    description: str = ""
    skip: tuple[Regex, ...] = ()

    def __post_init__(self) -> None:
        self.qconfig_mapping()

    @property
    def cost(self) -> str | None:
        """What the recipe was measured to cost on a real model, in a sentence; None for one of the user's own."""
        costs = json.loads((FOLDER / "costs.json").read_text(encoding="utf-8"))
        if self.name not in costs["recipes"] or self != load_recipe(self.name):
            return None
        before, after = costs["perplexity"], costs["recipes"][self.name]
        return (
            f"changes the perplexity of {costs['model']} from {before:.2f} to {after['perplexity']:.2f} "
            f"(KL divergence {after['kl_divergence']:.2g} nats, on {costs['tokens']} tokens of {costs['text']})"
        )

    @property
    def note(self) -> str:
        """Its name, and its cost where that was measured."""
        cost = self.cost
        return self.name if cost is None else f"{self.name}: {cost}"

    def qconfig_mapping(self, model: nn.Module | None = None) -> QConfigMapping:
        """The quantization configuration that `llm.optimize` and `quantization.prepare` take, for `model` if given."""
        mapping = QConfigMapping().set_global(self.settings.qconfig())
        for kind, qconfig in self.settings.types().items():
            mapping.set_object_type(kind, qconfig)
        for name, qconfig in ({} if model is None else self.settings.exceptions_of(model)).items():
            if not any(re.match(pattern, name) for pattern in self.skip):
                mapping.set_module_name(name, qconfig)
        for pattern, qconfig in {**dict.fromkeys(self.skip), **self.settings.exceptions()}.items():
            mapping.set_module_name_regex(pattern, qconfig)
        return mapping


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Input features of every linear layer of `model`, and the fewest of every module with experts, by name."""
    widths = {}
    for name, module in named_layers(model):
        if is_linear(module):
            widths[name] = linear_shape(module)[1]
        elif holds_experts(module):
            widths[name] = min(min(p.shape[1:]) for p in module.parameters(recurse=False) if p.dim() == 3)
    return widths


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The packaged recipe of that name, or the one in that YAML file.

    Raises ValueError, which names the recipe, for an unknown name, an unknown key or a value that does not fit.
    """
    path = FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in recipe_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"recipe: expected a file or one of {', '.join(recipe_names())}, got {str(name_or_path)!r}")
    try:
        return _parsed(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path.stem}: {error}") from error


_OWN_KEYS = ("description", "skip")
"""Keys of every recipe, whatever its algorithm."""


def _parsed(name: str, content: object) -> Recipe:
    if not isinstance(content, dict):
        raise ValueError(f"expected keys and values, got {type(content).__name__}")
    algorithm = content.pop("algorithm", "rtn")
    if algorithm not in list(ALGORITHMS):
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    own_hints = get_type_hints(Recipe, include_extras=True)
    hints = {key: own_hints[key] for key in _OWN_KEYS} | get_type_hints(ALGORITHMS[algorithm], include_extras=True)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"unknown key {key!r}, {algorithm} takes {', '.join(sorted({'algorithm', *hints}))}")
        try:
            values[key] = parse(hints[key], value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    own = {key: values.pop(key) for key in _OWN_KEYS if key in values}
    return Recipe(name, ALGORITHMS[algorithm](**values), **own)
