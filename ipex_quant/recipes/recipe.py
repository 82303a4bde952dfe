"""`Recipe`: one way to quantize a model, read from YAML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from torch import nn
from torch.ao.quantization import QConfigMapping

from .. import quantization
from ..nn.embeddings import is_embedding
from ..nn.linears import holds_experts, is_linear, linear_shape, output_head
from ..nn.multihead_attention import named_layers
from ..numerics.scheme import WeightScheme
from ..observers import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from ..quantization import (
    AutoRoundOptions,
    AwqOptions,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)
from ..woq.gptq import GptqOptions
from . import FOLDER, recipe_names
from .fields import Count, Fraction, Regex, parse, written

SMALLEST_GROUP = 32

OBSERVERS = {
    "histogram": HistogramObserver.with_args(reduce_range=False),
    "min_max": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
}
"""Observers that find the range of an activation, by their names in recipes."""


class Settings:
    """Settings of an algorithm; the fields of each subclass are the keys of its recipes."""

    def qconfig(self) -> Any:
        """Configuration of all layers except for the exceptions."""
        raise NotImplementedError

    def exceptions(self) -> dict[str, Any]:
        """Configurations by regular expressions of layer names; the first match applies."""
        return {}

    def types(self) -> dict[type[nn.Module], Any]:
        """Configurations by type of module, for modules that are quantized only by a rule for their type."""
        return {}

    def exceptions_of(self, model: nn.Module) -> dict[str, Any]:
        """Configurations of layers of `model`, by name, that depend on their shape and position."""
        return {}


@dataclass(frozen=True)
class Calibrated(Settings):
    """Settings of an algorithm that calibrates on `samples` windows of `sequence_length` tokens."""

    samples: Count = 128
    sequence_length: Count = 512


@dataclass(frozen=True)
class WeightOnly(Settings):
    """Weight-only quantization by rounding to nearest, computed in `lowp_mode` with `act_quant_mode`.

    With `min_groups`, a layer with fewer groups per row than that, or whose width `group_size` does not divide, has
    smaller groups, of at least 32 features: rounding errors of narrow layers average out less. `head_dtype` is the
    dtype of the output layer's weight, per channel, if it differs from `weight_dtype`. `embedding_dtype` is the dtype
    of embeddings, with one scale per row; without it they stay in float. `schemes`, which go first, are those of linear
    layers and embeddings by regular expressions of their names; the first that matches applies.
    """

    weight_dtype: WoqWeightDtype = WoqWeightDtype.INT8
    weight_qscheme: WoqWeightQScheme = WoqWeightQScheme.UNDEFINED
    group_size: int = -1
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
    min_groups: int = 0
    head_dtype: WoqWeightDtype | None = None
    embedding_dtype: WoqWeightDtype | None = None
    schemes: dict[Regex, WeightScheme] = field(default_factory=dict)

    def qconfig(self) -> Any:
        return self._with()

    def exceptions_of(self, model: nn.Module) -> dict[str, Any]:
        widths = layer_widths(model)
        sizes = {name: self.group_size_for(width) for name, width in widths.items()}
        found = {name: self._with(group_size=size) for name, size in sizes.items() if size != self.group_size}
        head = output_head(model)
        if self.head_dtype is not None and head is not None:
            found[head] = self._per_channel(self.head_dtype)
        tables = (name for name, module in model.named_modules() if is_embedding(module))
        for name in (*widths, *tables) if self.schemes else ():
            scheme = next((each for pattern, each in self.schemes.items() if re.match(pattern, name)), None)
            if scheme is not None:
                found[name] = self._with(
                    weight_dtype=scheme.dtype, group_size=scheme.group_size, weight_qscheme=scheme.qscheme
                )
        return found

    def types(self) -> dict[type[nn.Module], Any]:
        return {} if self.embedding_dtype is None else {nn.Embedding: self._per_channel(self.embedding_dtype)}

    def group_size_for(self, width: int) -> int:
        """The group size of a layer with `width` input features."""
        size = self.group_size
        while self.min_groups and size > SMALLEST_GROUP and (width % size or width < self.min_groups * size):
            size //= 2
        return size

    def _per_channel(self, dtype: WoqWeightDtype) -> Any:
        return self._with(weight_dtype=dtype, group_size=-1, weight_qscheme=WoqWeightQScheme.UNDEFINED)

    def _with(self, **changes: Any) -> Any:
        names = ("weight_dtype", "weight_qscheme", "group_size", "lowp_mode", "act_quant_mode")
        settings = {name: getattr(self, name) for name in names} | changes
        return get_weight_only_quant_qconfig_mapping(**settings, scale_dtype=torch.float16).global_qconfig


def _check_calibrated(dtype: WoqWeightDtype, algorithm: str) -> None:
    if dtype.is_float:
        raise ValueError(f"weight_dtype: {algorithm} finds integers and codes of tables, got {dtype.name.lower()}")


@dataclass(frozen=True)
class Gptq(WeightOnly, Calibrated):
    """`WeightOnly` with GPTQ for the weights in transformer blocks; the other fields are those of `GptqOptions`."""

    samples: Count = 64
    act_order: bool = GptqOptions.act_order
    static_groups: bool = GptqOptions.static_groups
    percdamp: float = GptqOptions.percdamp
    clip_steps: int = GptqOptions.clip_steps
    lowest_clip: float = GptqOptions.lowest_clip
    refit: bool | None = GptqOptions.refit
    correction: Fraction = GptqOptions.correction

    def __post_init__(self) -> None:
        _check_calibrated(self.weight_dtype, "gptq")
        self.options()

    def options(self) -> GptqOptions:
        """The options of GPTQ, with scales in float16, as in GPTQ checkpoints."""
        names = ("act_order", "static_groups", "percdamp", "clip_steps", "lowest_clip", "refit", "correction")
        return GptqOptions(**{name: getattr(self, name) for name in names}, scale_dtype=torch.float16)


@dataclass(frozen=True)
class Awq(WeightOnly, Calibrated):
    """`WeightOnly` with AWQ for the weights in transformer blocks; the other fields are those of `AwqOptions`.

    With `gptq`, GPTQ with its default options rounds the scaled weights.
    """

    samples: Count = 64
    alpha_steps: int = AwqOptions.alpha_steps
    clip_steps: int = AwqOptions.clip_steps
    lowest_clip: float = AwqOptions.lowest_clip
    tokens: int = AwqOptions.tokens
    gptq: bool = False

    def __post_init__(self) -> None:
        if self.gptq:
            _check_calibrated(self.weight_dtype, "gptq")
        self.options()

    def options(self) -> AwqOptions:
        """The options of AWQ's search, with scales in float16, as checkpoints hold them."""
        gptq = GptqOptions(scale_dtype=torch.float16) if self.gptq else None
        return AwqOptions(
            self.alpha_steps, self.clip_steps, self.lowest_clip, self.tokens, gptq, scale_dtype=torch.float16
        )


@dataclass(frozen=True)
class AutoRound(WeightOnly, Calibrated):
    """`WeightOnly` with AutoRound for the weights in transformer blocks; the others are those of `AutoRoundOptions`."""

    samples: Count = 64
    steps: Count = AutoRoundOptions.steps
    batch_size: Count = AutoRoundOptions.batch_size
    rate: float | None = AutoRoundOptions.rate
    clip_rate: float = AutoRoundOptions.clip_rate
    seed: int = AutoRoundOptions.seed

    def __post_init__(self) -> None:
        _check_calibrated(self.weight_dtype, "auto_round")
        self.options()

    def options(self) -> AutoRoundOptions:
        """The options of AutoRound, with scales in float16, as checkpoints hold them."""
        return AutoRoundOptions(
            self.steps, self.batch_size, self.rate, self.clip_rate, self.seed, scale_dtype=torch.float16
        )


@dataclass(frozen=True)
class EightBits(Settings):
    """Per-channel INT8 weights, and activations in INT8.

    Layers whose name matches a regular expression in `weight_only` keep their activations in 16 bits and compute in
    BF16: those whose inputs have outliers that nothing takes out.
    """

    weight_only: tuple[Regex, ...] = ()

    def exceptions(self) -> dict[str, Any]:
        mapping = get_weight_only_quant_qconfig_mapping(
            weight_qscheme=WoqWeightQScheme.SYMMETRIC, lowp_mode=WoqLowpMode.BF16
        )
        return dict.fromkeys(self.weight_only, mapping.global_qconfig)


@dataclass(frozen=True)
class Dynamic(EightBits):
    """`EightBits` with activations quantized dynamically, per token."""

    def qconfig(self) -> Any:
        return quantization.default_dynamic_qconfig


@dataclass(frozen=True)
class Static(EightBits, Calibrated):
    """`EightBits` with activations quantized statically, with ranges found by one of `OBSERVERS`."""

    observer: str = "histogram"

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer: expected one of {', '.join(OBSERVERS)}, got {self.observer!r}")

    def qconfig(self) -> Any:
        return quantization.default_static_qconfig._replace(activation=OBSERVERS[self.observer])


@dataclass(frozen=True)
class SmoothQuant(EightBits, Calibrated):
    """Static `EightBits` with SmoothQuant: by `alpha`, or for layers whose name matches, the first match in `alphas`.

    With `share_weight_observers`, layers that read the same tensor share one smoothing factor.
    """

    alpha: Fraction = 0.5
    alphas: dict[Regex, Fraction] = field(default_factory=dict)
    share_weight_observers: bool = True

    def qconfig(self) -> Any:
        return self._with(self.alpha)

    def exceptions(self) -> dict[str, Any]:
        return super().exceptions() | {pattern: self._with(alpha) for pattern, alpha in self.alphas.items()}

    def _with(self, alpha: float) -> Any:
        mapping = get_smooth_quant_qconfig_mapping(alpha, share_weight_observers=self.share_weight_observers)
        return mapping.global_qconfig


ALGORITHMS: dict[str, type[Settings]] = {
    "rtn": WeightOnly,
    "gptq": Gptq,
    "awq": Awq,
    "auto_round": AutoRound,
    "smoothquant": SmoothQuant,
    "static": Static,
    "dynamic": Dynamic,
}


@dataclass(frozen=True)
class Recipe:
    """A way to quantize a model. Modules whose name matches a regular expression in `skip` stay in float.

    With `rotate` the model is rotated first, as `quantization.rotate` does it.
    """

    name: str
    settings: Settings
    description: str = ""
    skip: tuple[Regex, ...] = ()
    rotate: bool = False

    def __post_init__(self) -> None:
        self.qconfig_mapping()

    @property
    def cost(self) -> str | None:
        """The measured cost of the recipe on a real model, in a sentence; None for a recipe of the user."""
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
        """The name of the recipe, with its cost if measured."""
        cost = self.cost
        return self.name if cost is None else f"{self.name}: {cost}"

    def qconfig_mapping(self, model: nn.Module | None = None) -> QConfigMapping:
        """The configuration for `llm.optimize` and `quantization.prepare`, with exceptions for `model` if given."""
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
    """Input features of every linear layer of `model`, and the fewest of the experts of a module, by name."""
    widths = {}
    for name, module in named_layers(model):
        if is_linear(module):
            widths[name] = linear_shape(module)[1]
        elif holds_experts(module):
            widths[name] = min(min(p.shape[1:]) for p in module.parameters(recurse=False) if p.dim() == 3)
    return widths


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The packaged recipe with a name, or the recipe in a YAML file.

    Raises ValueError, which names the recipe, for an unknown name, an unknown key or a value that does not fit.
    """
    path = FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in recipe_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"recipe: expected a file or one of {', '.join(recipe_names())}, got {str(name_or_path)!r}")
    try:
        return _parsed(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path.stem}: {error}") from error


def recipe_yaml(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads as `recipe`, but for its name."""
    algorithm = next(name for name, kind in ALGORITHMS.items() if kind is type(recipe.settings))
    content: dict[str, Any] = {"description": recipe.description, "algorithm": algorithm}
    default: dict[str, Any] = vars(ALGORITHMS[algorithm]())
    content |= {key: written(value) for key, value in vars(recipe.settings).items() if value != default[key]}
    content |= {"skip": written(recipe.skip)} if recipe.skip else {}
    content |= {"rotate": True} if recipe.rotate else {}
    return yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)


_OWN_KEYS = ("description", "skip", "rotate")
"""Keys that recipes of all algorithms have."""


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
