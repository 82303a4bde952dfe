"""Weight-only quantization within a budget of bytes: the space of schemes, their estimated errors, and the models."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.ao.quantization import QConfigMapping
from tqdm import tqdm

from .. import ops
from ..conversion.example import Example
from ..conversion.found import FoundWeights
from ..conversion.prepare import convert, prepare
from ..conversion.qconfig import DEFAULT_ACT_QUANT_MODE, get_weight_only_quant_qconfig_mapping
from ..conversion.rules import choose_qconfigs
from ..conversion.swap import with_split_attentions
from ..nn.fused_forward import restored_forwards
from ..nn.linears import is_linear, output_head, weight_matrix
from ..numerics.affine import dequantize
from ..numerics.scheme import QConfigWoq, WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ..smoothquant.tracing import trace_groups
from ..woq.awq_blocks import awq_blocks
from ..woq.gptq_blocks import quantize_blocks
from ..woq.towers import find_blocks
from .allocation import Option, allocate
from .candidate import WeightOnlyCandidate
from .divergence import sample_layers
from .search import Search, search_weight_only
from .trials import Trial

ALGORITHMS = ("gptq", "awq", "rtn")
SIZE_STEP = 1.05
"""Ratio of consecutive sizes that are tried without a budget."""


@dataclass(frozen=True)
class WeightOnlySpace:
    """The search space of weight-only quantization: all valid combinations of the fields.

    `algorithms` ("gptq", "awq" or "rtn") are tried in the order given. `lm_head` lists whether the output layer may be
    quantized (True), may stay in float (False), or both. With `mixed`, layers may get different schemes. Raises
    ValueError for an empty field and an unknown algorithm.
    """

    weight_dtypes: Sequence[WoqWeightDtype] = (WoqWeightDtype.INT4, WoqWeightDtype.INT8)
    group_sizes: Sequence[int] = (128, 64, 32, -1)
    qschemes: Sequence[WoqWeightQScheme] = (WoqWeightQScheme.ASYMMETRIC, WoqWeightQScheme.SYMMETRIC)
    algorithms: Sequence[str] = ALGORITHMS
    lowp_modes: Sequence[WoqLowpMode] = (WoqLowpMode.INT8,)
    act_quant_mode: WoqActQuantMode = DEFAULT_ACT_QUANT_MODE
    lm_head: Sequence[bool] = (True,)
    mixed: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_dtypes", "group_sizes", "qschemes", "algorithms", "lowp_modes", "lm_head"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"quantization_config: {name}: expected at least one value in a list, got {values!r}")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        unknown = [name for name in self.algorithms if name not in ALGORITHMS]
        if unknown:
            raise ValueError(f"quantization_config: algorithms: expected some of {ALGORITHMS}, got {unknown}")

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
        )

    def schemes(self, lowp_mode: WoqLowpMode) -> list[WeightScheme]:
        """All schemes that can be computed in `lowp_mode`; ValueError if there is none."""
        found: dict[WeightScheme, None] = {}
        for dtype, group_size, qscheme in itertools.product(self.weight_dtypes, self.group_sizes, self.qschemes):
            with suppress(ValueError):  # no such combination
                found[_qconfig(dtype, group_size, qscheme, lowp_mode, self.act_quant_mode).scheme] = None
        if not found:
            raise ValueError(f"quantization_config: none of its combinations exists for lowp_mode {lowp_mode.name}")
        return list(found)


class WeightOnlyQuantizer:
    """Makes weight-only models, with schemes chosen by errors that are estimated on a few batches.

    Layers that consume the same tensor get the same scheme, so that their GEMMs can be fused. Layers in `always_float`
    stay in float.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Example],
        space: WeightOnlySpace,
        max_bytes_per_weight: float | None,
        always_float: frozenset[str],
        seed: int,
    ) -> None:
        model = with_split_attentions(model)
        self.model, self.batches, self.space = model, batches, space
        self.max_bytes_per_weight = max_bytes_per_weight
        chosen, _ = choose_qconfigs(get_weight_only_quant_qconfig_mapping(), model)
        self.layers = [name for name in chosen if is_linear(model.get_submodule(name))]
        self.head = output_head(model)
        self.always_float = always_float & set(self.layers)
        self.groups = self._share_groups()
        if set(self.groups) == self.always_float:
            raise ValueError("op_type_dict: it leaves all layers in float, so that there is nothing to tune")
        samples = sample_layers(model, batches, self.layers, seed)
        missed = [name for name in self.layers if name not in samples]
        if missed:
            warnings.warn(f"autotune: no batch reached {', '.join(missed)}: they get the smallest scheme", stacklevel=4)
        every = dict.fromkeys(scheme for mode in space.lowp_modes for scheme in space.schemes(mode))
        self.options = {
            name: [self._option(group, samples, scheme) for scheme in (*every, None)]
            for name, group in tqdm(self.groups.items(), "estimating errors")
        }
        self.weights = sum(weight_matrix(model.get_submodule(name)).numel() for name in self.layers)
        self._found: tuple[Any, FoundWeights] = (None, FoundWeights())

    def search(self) -> Search:
        """The search; ValueError if no candidate is within the budget."""
        candidates = [
            [candidate for lowp_mode in self.space.lowp_modes for candidate in self._candidates(budget, lowp_mode)]
            for budget in self._budgets()
        ]
        candidates = [of_one_size for of_one_size in candidates if of_one_size]
        if not candidates:
            raise ValueError(
                f"max_bytes_per_weight: {self.max_bytes_per_weight:g} is too few for all of the schemes; the smallest "
                f"take {self._smallest():.4f}"
            )
        return search_weight_only(candidates)

    def cost(self, trial: Trial) -> float:
        """The size in bytes per weight, which counts before accuracy; 0 if there is a budget."""
        return trial.bytes_per_weight if self.max_bytes_per_weight is None else 0.0

    def quantized(self, candidate: WeightOnlyCandidate) -> nn.Module:
        """A new model quantized by `candidate`."""
        return self.result(self.model, candidate, inplace=False)

    def result(self, model: nn.Module, candidate: WeightOnlyCandidate, inplace: bool) -> nn.Module:
        """`model`, or a copy, quantized by `candidate`."""
        key = candidate.algorithm, candidate.schemes
        if self._found[0] != key:
            self._found = key, find_weights(self.model, self.batches, candidate)
        return quantized_model(model, candidate, self._found[1], self.space.act_quant_mode, inplace)

    def sensitivity(self, candidate: WeightOnlyCandidate) -> dict[str, dict[str, Any]]:
        """Scheme and estimated error of every share group, by the name of its first layer."""
        schemes = dict(candidate.schemes)
        found = {}
        for name, options in self.options.items():
            option = next(option for option in options if option.scheme == schemes[name])
            found[name] = {"error": option.error, "scheme": str(option.scheme or "float")}
        return found

    def _option(self, group: Sequence[str], samples: Mapping[str, Any], scheme: WeightScheme | None) -> Option:
        size, error = 0, 0.0
        for name in group:
            module = self.model.get_submodule(name)
            weight = weight_matrix(module)
            if scheme is None:
                size += weight.numel() * weight.element_size()
                continue
            quantized = ops.quantize_weight(weight, scheme)
            size += ops.pack_weight(quantized).nbytes + (0 if module.bias is None else 4 * len(weight))
            if name in samples:
                error += samples[name].error(module, dequantize(quantized))
        return Option(scheme, size, error)

    def _allowed(self, name: str, lowp_mode: WoqLowpMode) -> list[Option]:
        """The options of a group that the space, the compute mode and `op_type_dict` allow."""
        if name in self.always_float:
            return [option for option in self.options[name] if option.scheme is None]
        schemes: list[WeightScheme | None] = list(self.space.schemes(lowp_mode))
        if self.head in self.groups[name]:
            schemes = [
                *(schemes if True in self.space.lm_head else []),
                *([None] if False in self.space.lm_head else []),
            ]
        return [option for option in self.options[name] if option.scheme in schemes]

    def _budgets(self) -> list[float]:
        """Budgets in bytes for all layers: the given one, or steps from the smallest to the largest uniform choice."""
        if self.max_bytes_per_weight is not None:
            return [self.max_bytes_per_weight * self.weights]
        budgets = [self._smallest() * self.weights]
        largest = max(
            sum(option.bytes for option in choice.values())
            for lowp_mode in self.space.lowp_modes
            for choice in self._uniform(lowp_mode)
        )
        while budgets[-1] < largest:
            budgets.append(min(budgets[-1] * SIZE_STEP, largest))
        return budgets

    def _uniform(self, lowp_mode: WoqLowpMode) -> Iterator[dict[str, Option]]:
        """Choices with one scheme for all layers, and each allowed choice for the output layer."""
        for scheme in self.space.schemes(lowp_mode):
            for head_quantized in self.space.lm_head:
                choice = {}
                for name in self.groups:
                    allowed = {option.scheme: option for option in self._allowed(name, lowp_mode)}
                    quantized = scheme in allowed and (head_quantized or name != self.head)
                    choice[name] = allowed[scheme if quantized else None]
                yield choice

    def _candidates(self, budget: float, lowp_mode: WoqLowpMode) -> Iterator[WeightOnlyCandidate]:
        """The mixed and the uniform choice of least estimated error within `budget` bytes, with each algorithm."""
        fitting = [each for each in self._uniform(lowp_mode) if sum(o.bytes for o in each.values()) <= budget]
        choices = [min(fitting, key=lambda each: sum(o.error for o in each.values()))] if fitting else []
        if self.space.mixed:
            mixed = allocate({name: self._allowed(name, lowp_mode) for name in self.groups}, budget)
            choices = [*([] if mixed is None else [mixed]), *choices]
        for choice in choices:
            schemes = tuple((name, choice[first].scheme) for first, group in self.groups.items() for name in group)
            for algorithm in self._algorithms():
                yield WeightOnlyCandidate(algorithm, lowp_mode, schemes)

    def _algorithms(self) -> Sequence[str]:
        """The space's algorithms; if these are the default and the model has no transformer blocks, "rtn" alone."""
        if self.space.algorithms == ALGORITHMS:
            try:
                find_blocks(self.model)
            except ValueError:
                return ("rtn",)
        return self.space.algorithms

    def _smallest(self) -> float:
        """Bytes per weight of the smallest choice."""
        smallest = [
            sum(min(option.bytes for option in self._allowed(name, lowp_mode)) for name in self.groups)
            for lowp_mode in self.space.lowp_modes
        ]
        return min(smallest) / self.weights

    def _share_groups(self) -> dict[str, tuple[str, ...]]:
        """Groups of layers that consume the same tensor, by the first name; layers that stay in float are alone."""
        with restored_forwards(self.model):
            traced = trace_groups(self.model, self.layers, (), partial(self.batches[0].run, self.model))
        together = [[name for name in group.members if name not in self.always_float] for group in traced]
        grouped = {name for members in together for name in members}
        together += [[name] for name in self.layers if name not in grouped]
        return {members[0]: tuple(members) for members in together if members}


def find_weights(model: nn.Module, batches: Sequence[Example], candidate: WeightOnlyCandidate) -> FoundWeights:
    """The weights that the algorithm of `candidate` finds for layers in transformer blocks; none for "rtn".

    GPTQ skips layers whose dtype it does not support, which are then rounded to nearest.
    """
    schemes = {name: scheme for name, scheme in candidate.schemes if scheme is not None}
    if candidate.algorithm == "rtn":
        return FoundWeights()
    inputs = [batch.by_name(model) for batch in batches]
    if candidate.algorithm == "awq":
        result = awq_blocks(model, inputs, schemes.get)
        return FoundWeights(result.weights, result.parameters)
    suited = {name: scheme for name, scheme in schemes.items() if scheme.dtype.has_integers}
    return FoundWeights(quantize_blocks(model, inputs, suited.get))


def quantized_model(
    model: nn.Module,
    candidate: WeightOnlyCandidate,
    found: FoundWeights,
    act_quant_mode: WoqActQuantMode,
    inplace: bool,
) -> nn.Module:
    """`model`, or a copy, with the layers of `candidate` quantized: the weights `found`, the others rounded."""
    mapping = QConfigMapping()
    for name, scheme in candidate.schemes:
        qconfig = None
        if scheme is not None:
            qconfig = _qconfig(scheme.dtype, scheme.group_size, scheme.qscheme, candidate.lowp_mode, act_quant_mode)
        mapping.set_module_name(name, qconfig)
    prepared = prepare(model, mapping, inplace=inplace)
    found.put_into(prepared)
    return convert(prepared, inplace=True)


def _qconfig(
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
