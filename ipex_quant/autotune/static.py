"""`StaticQuantizer`: static INT8 models of candidates, from the results of one calibration pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.ao.quantization import QConfigMapping
from tqdm import tqdm

from ..conversion.observed import LayerParameters, ObservedGroup, observed
from ..conversion.parameters import layer_parameters
from ..conversion.prepare import convert, prepare
from ..conversion.qconfig import QuantizationKind, default_static_qconfig, get_smooth_quant_qconfig_mapping
from ..nn.linears import is_linear
from ..observers import has_data
from .calibration_pass import CalibrationPass, RecordingObserver, is_smoothed
from .candidate import AUTO, Int8Candidate
from .search import Layer, Search, search_int8
from .sensitivity import COMBINE, block_error, int8_errors
from .trials import Trial


@dataclass(frozen=True)
class AlphaSearch:
    """How alpha "auto" is found: the `alphas` to try, and the `COMBINE` function for errors of a share group.

    With `by_block` there is one alpha per transformer block, found by the error of the block's output. Of equally good
    alphas the one closest to `first` is used.
    """

    alphas: tuple[float, ...] = tuple(i / 10 for i in range(11))
    shared_criterion: str = "mean"
    by_block: bool = False
    first: float = 0.5


@dataclass(frozen=True)
class Int8Plan:
    """The parameters, error and alpha of every layer for a candidate, by name."""

    parameters: dict[str, LayerParameters]
    errors: dict[str, float]
    alphas: dict[str, float | None]


class StaticQuantizer:
    """Makes static INT8 models from a calibration pass, with any of `alphas`; `always_float` layers stay in float."""

    def __init__(
        self,
        calibration: CalibrationPass,
        alphas: Sequence[float | str | None],
        alpha_search: AlphaSearch,
        always_float: frozenset[str] = frozenset(),
    ) -> None:
        self.calibration, self.alphas, self.alpha_search = calibration, alphas, alpha_search
        self.model = calibration.model
        self.always_float = always_float & set(self.layers)
        if self.always_float == set(self.layers):
            raise ValueError("op_type_dict: it leaves all layers in float, so that there is nothing to tune")
        self._plans: dict[tuple[int, float | str | None], Int8Plan] = {}

    @property
    def layers(self) -> list[str]:
        """Names of all layers that can be quantized."""
        return [layer.name for group in self.calibration.groups for layer in group.layers]

    def search(self) -> Search:
        """The search, which tries candidates of least total error first."""
        candidates = [
            Int8Candidate(alpha, samples, tuple(sorted(self.always_float)))
            for samples in self.calibration.observers
            for alpha in self.alphas
        ]
        candidates.sort(key=lambda candidate: sum(self.plan(candidate).errors.values()))
        return search_int8(candidates, self._searched_layers)

    def predicted(self, candidate: Int8Candidate) -> None:
        """None: errors of layers order candidates, and say nothing of the loss."""

    def cost(self, trial: Trial) -> float:
        """The number of layers in float, which counts before accuracy."""
        return len(trial.recipe["float_modules"])

    def sensitivity(self, candidate: Int8Candidate) -> dict[str, dict[str, Any]]:
        """Error and alpha of every layer."""
        plan = self.plan(candidate)
        return {name: {"error": plan.errors[name], "alpha": plan.alphas[name]} for name in plan.errors}

    def plan(self, candidate: Int8Candidate) -> Int8Plan:
        """The plan of `candidate` for all layers, also those it leaves in float; plans are cached."""
        key = candidate.samples, candidate.alpha
        if key not in self._plans:
            alphas = self._auto_alphas(candidate.samples) if candidate.alpha == AUTO else {}
            plan = Int8Plan({}, {}, {})
            for group in self._groups(candidate.samples):
                alpha = alphas.get(group.name, candidate.alpha) if is_smoothed(group, self.model) else None
                parameters, errors = self._measure(candidate.samples, group, alpha)
                names = [layer.name for layer in group.layers]
                plan.parameters.update(zip(names, parameters, strict=True))
                plan.errors.update(zip(names, errors, strict=True))
                plan.alphas.update(dict.fromkeys(names, alpha))
            self._plans[key] = plan
        return self._plans[key]

    def quantized(self, candidate: Int8Candidate) -> nn.Module:
        """A new model quantized by `candidate`; its float weights are copies."""
        plan = self.plan(candidate)
        in_float = set(candidate.float_modules)
        for group in observed(self.model).groups:
            for layer in group.layers:
                layer.parameters = plan.parameters.get(layer.name)
                layer.quantized = layer.parameters is not None and layer.name not in in_float
        return convert(self.model)

    def result(self, model: nn.Module, candidate: Int8Candidate, inplace: bool) -> nn.Module:
        """`model`, or a copy, prepared, with the parameters of `candidate` loaded."""
        plan, example = self.plan(candidate), self.calibration.example
        prepared = prepare(
            model,
            _mapping(plan.alphas),
            example.args or None,
            inplace=inplace,
            example_kwarg_inputs=example.kwargs or None,
        )
        in_float = set(candidate.float_modules)
        for group in observed(prepared).static_groups:
            for layer in group.layers:
                layer.parameters = plan.parameters.get(layer.name)
                layer.quantized = layer.name not in in_float
        return prepared

    def _searched_layers(self, candidate: Int8Candidate) -> list[Layer]:
        modules = dict(self.model.named_modules())
        return [
            Layer(name, layer_type(name, modules[name]), error, modules[name].weight.numel())
            for name, error in self.plan(candidate).errors.items()
            if name not in self.always_float
        ]

    def _groups(self, samples: int) -> Iterator[ObservedGroup]:
        reached = self.calibration.observers[samples]
        yield from (group for group in self.calibration.groups if group.name in reached)

    def _auto_alphas(self, samples: int) -> dict[str, float]:
        """The alpha of least error for every share group, or for all groups of a transformer block together."""
        together: dict[str, list[ObservedGroup]] = {}
        for group in self._groups(samples):
            if is_smoothed(group, self.model):
                together.setdefault(self._block_of(group.name) or group.name, []).append(group)
        found = {}
        for name, members in tqdm(together.items(), "searching alpha"):
            errors = {alpha: self._error(samples, name, members, alpha) for alpha in self.alpha_search.alphas}
            # Of equal errors, prefer the alpha closest to `first`: extreme ones overfit the sample.
            best = min(errors, key=lambda alpha: (errors[alpha], abs(alpha - self.alpha_search.first)))
            found |= {group.name: best for group in members}
        for group in self.calibration.groups:
            group.reset()  # running blocks has added data to the observers
        return found

    def _error(self, samples: int, name: str, members: list[ObservedGroup], alpha: float) -> float:
        """The error of the share group, or of the block, called `name`."""
        call = self.calibration.block_calls.get(name)
        if call is None:
            return sum(self._combined(samples, group, alpha) for group in members)
        parameters = {}
        for group in members:
            _, half = self._both_parameters(samples, group, alpha)
            parameters |= {self.model.get_submodule(layer.name): p for layer, p in zip(group.layers, half, strict=True)}
        return block_error(self.model.get_submodule(name), call, parameters)

    def _combined(self, samples: int, group: ObservedGroup, alpha: float) -> float:
        return COMBINE[self.alpha_search.shared_criterion](self._measure(samples, group, alpha)[1])

    def _measure(
        self, samples: int, group: ObservedGroup, alpha: float | None
    ) -> tuple[list[LayerParameters], list[float]]:
        """Parameters of the layers of `group`, and their errors."""
        whole, half = self._both_parameters(samples, group, alpha)
        modules = [self.model.get_submodule(layer.name) for layer in group.layers]
        return whole, int8_errors(modules, self.calibration.samples[group.name], half)

    def _both_parameters(
        self, samples: int, group: ObservedGroup, alpha: float | None
    ) -> tuple[list[LayerParameters], list[LayerParameters]]:
        """Parameters from all the data, and from the half without the sample, with which to measure errors."""
        observer = self.calibration.observers[samples][group.name]
        whole = self._parameters(observer, group, alpha)
        if alpha is None or not has_data(observer.other_half):
            return whole, whole
        return whole, self._parameters(observer, group, alpha, observer.other_half)

    def _parameters(
        self, observer: RecordingObserver, group: ObservedGroup, alpha: float | None, channels: nn.Module | None = None
    ) -> list[LayerParameters]:
        """Parameters of the layers of `group`; `channels` overrides the observer's own."""
        kind = QuantizationKind.STATIC if alpha is None else QuantizationKind.SMOOTH_QUANT
        modules = {layer.name: self.model.get_submodule(layer.name) for layer in group.layers}
        return layer_parameters(kind, observer, modules, group.layers[0].qconfig, alpha, channels)

    def _block_of(self, name: str) -> str | None:
        """The name of the transformer block with the layer `name`, if the block's call was kept."""
        return next((block for block in self.calibration.block_calls if name.startswith(f"{block}.")), None)


def layer_type(name: str, module: nn.Module) -> str:
    """The type of a layer: a linear layer's name in its parent, or its class if that name is a number."""
    own = name.rpartition(".")[2]
    return own if is_linear(module) and not own.isdecimal() else type(module).__name__


def _mapping(alphas: Mapping[str, float | None]) -> QConfigMapping:
    """A mapping that gives every layer its alpha; layers with one alpha have the same configuration."""
    mapping = get_smooth_quant_qconfig_mapping()
    made: dict[float | None, Any] = {None: default_static_qconfig()}
    for name, alpha in alphas.items():
        if alpha not in made:
            made[alpha] = get_smooth_quant_qconfig_mapping(alpha).global_qconfig
        mapping.set_module_name(name, made[alpha])
    return mapping
