"""Weight-only quantization within a budget: the estimated errors of schemes, the search and the models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping

from ..conversion.example import Example
from ..conversion.found import FoundWeights
from ..conversion.prepare import convert, prepare
from ..conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ..conversion.rules import choose_qconfigs
from ..conversion.swap import with_split_attentions
from ..conversion.tying import tied_modules
from ..evaluation import model_bytes
from ..nn.embeddings import is_embedding
from ..nn.fused_forward import restored_forwards
from ..nn.linears import is_linear, output_head, weight_matrix
from ..numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode
from ..smoothquant.tracing import trace_groups
from ..woq.auto_round import AutoRoundOptions
from ..woq.auto_round_blocks import auto_round_blocks
from ..woq.awq import AwqOptions
from ..woq.awq_blocks import awq_blocks
from ..woq.gptq import GptqOptions
from ..woq.gptq_blocks import quantize_blocks
from ..woq.towers import find_blocks
from .allocation import Option, allocate
from .budget import Budget
from .candidate import WeightOnlyCandidate
from .costs import SchemeCosts, fits_half, matrix_of, rounded
from .divergence import sample_layers
from .fit import MonotoneFit
from .search import Search, first_success, search_largest, search_weight_only
from .space import ALGORITHMS, WeightOnlySpace, layer_qconfig
from .trials import Trial

SIZE_STEP = 1.05
"""Ratio of consecutive sizes that are tried where no budget says the size."""


class WeightOnlyQuantizer:
    """Makes weight-only models, with schemes chosen by errors that are estimated on a few batches.

    Layers that consume the same tensor get the same scheme, so that their GEMMs can be fused, and so do an embedding
    and an output layer that are one weight. Layers in `always_float` stay in float. `tolerance` is the loss that the
    criterion allows. If not `thorough`, the search ends with the first success.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Example],
        space: WeightOnlySpace,
        budget: Budget,
        always_float: frozenset[str],
        seed: int,
        tolerance: float = math.inf,
        thorough: bool = True,
    ) -> None:
        model = with_split_attentions(model)
        self.model, self.batches, self.space, self.budget = model, batches, space, budget
        self.tolerance, self.thorough = tolerance, thorough
        mapping = get_weight_only_quant_qconfig_mapping()
        if space.embeddings:
            mapping.set_object_type(nn.Embedding, mapping.global_qconfig)
        chosen, _ = choose_qconfigs(mapping, model)
        self.layers = [name for name in chosen if is_linear(model.get_submodule(name))]
        self.head = output_head(model)
        self.always_float = always_float & set(chosen)
        self.groups = self._share_groups([name for name in chosen if is_embedding(model.get_submodule(name))])
        if set(self.groups) <= self.always_float:
            raise ValueError("op_type_dict: it leaves all layers in float, so that there is nothing to tune")
        members = [name for group in self.groups.values() for name in group]
        samples = sample_layers(model, batches, members, seed)
        missed = [name for name in members if name not in samples]
        if missed:
            warnings.warn(f"autotune: no batch reached {', '.join(missed)}: they get the smallest scheme", stacklevel=4)
        counted = members if self._counts_all else self.layers
        self.costs = SchemeCosts(model, space, self.groups, counted, samples)
        tuned = [name for name in self.groups if name not in self.always_float]
        if self.costs.blocks and all(sample.is_divergence for sample in samples.values()):
            self.costs.correct(batches, tuned)
        self.weights = sum(weight_matrix(model.get_submodule(name)).numel() for name in self.layers)
        self.rest = self._other_bytes(members) if self._counts_all else 0
        self.fits = {algorithm: MonotoneFit() for algorithm in space.algorithms}
        self._found: tuple[Any, FoundWeights] = (None, FoundWeights())

    def search(self) -> Search:
        """The search, which corrects its predictions by the trials; ValueError if no candidate is within the budget."""
        search = self._search()
        trial = None
        trials: dict[Any, Trial] = {}
        while True:
            try:
                candidate = search.send(trial)
            except StopIteration:
                return
            if candidate not in trials:
                trials[candidate] = yield candidate
                self.fits[candidate.algorithm].add(self._estimate(candidate), trials[candidate].loss)
            trial = trials[candidate]

    def predicted(self, candidate: WeightOnlyCandidate) -> float:
        """The loss of a candidate that its estimate and the trials so far predict."""
        return self.fits[candidate.algorithm](self._estimate(candidate))

    def cost(self, trial: Trial) -> float:
        """The size in bytes, which counts before accuracy; 0 where the budget says the size."""
        fixed = self.budget.max_bytes_per_weight is not None or self.budget.without_accuracy
        return 0.0 if fixed else float(trial.model_bytes)

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
        chosen = self._chosen(candidate)
        return {name: {"error": o.error, "scheme": str(o.scheme or "float")} for name, o in chosen.items()}

    def _search(self) -> Search:
        limits = self._limits()
        sizes = [[each for mode in self.space.lowp_modes for each in self._candidates(x, mode)] for x in limits]
        sizes = [of_one_size for of_one_size in sizes if of_one_size]
        if not sizes:
            raise ValueError(self._too_small())
        if self.budget.tokens_per_second is not None:
            sizes = yield from self._fast_enough(sizes)
        if len(sizes) == 1 or self.budget.without_accuracy:
            yield from search_largest(sizes, self.thorough)
        else:
            yield from search_weight_only(sizes, partial(self._smallest_predicted, sizes), self.thorough)

    def _fast_enough(self, sizes: Sequence[Sequence[WeightOnlyCandidate]]) -> Search:
        """The `sizes` that decode as fast as the budget says; what rounds to nearest is measured, which is quick."""
        wanted = self.budget.tokens_per_second or 0.0
        falling = [WeightOnlyCandidate("rtn", each[0].lowp_mode, each[0].schemes) for each in reversed(sizes)]
        byte_counts = [self._bytes(candidate) for candidate in falling]
        times = MonotoneFit()
        fastest: list[Trial] = []

        def attempt(index: int) -> Search:
            trial = yield falling[index]
            if trial.measured_ms is None:
                raise ValueError(
                    f"tokens_per_second: a {type(self.model).__name__} does not decode token by token; leave it out"
                )
            times.add(byte_counts[index], trial.measured_ms)
            fastest.append(trial)
            return trial.measured_ms * wanted <= 1e3

        def guess() -> int:
            return next((i for i, size in enumerate(byte_counts) if times(size) * wanted <= 1e3), len(falling))

        first = yield from first_success(len(falling), attempt, guess)
        if first == len(falling):
            best = min(fastest, key=lambda trial: trial.measured_ms or math.inf)
            raise ValueError(
                f"tokens_per_second: {wanted:g} is more than any scheme reaches on this machine: the fastest, "
                f"{best.label}, {best.model_bytes / 1e6:.1f} MB, decodes {1e3 / (best.measured_ms or math.inf):.1f}"
            )
        return sizes[: len(sizes) - first]

    def _smallest_predicted(self, sizes: Sequence[Sequence[WeightOnlyCandidate]]) -> int:
        """Index of the first size whose first candidate is predicted to meet the criterion."""
        return next((i for i, each in enumerate(sizes) if self.predicted(each[0]) <= self.tolerance), len(sizes))

    def _estimate(self, candidate: WeightOnlyCandidate) -> float:
        return sum(option.error for option in self._chosen(candidate).values())

    def _bytes(self, candidate: WeightOnlyCandidate) -> int:
        return self.rest + sum(option.bytes for option in self._chosen(candidate).values())

    def _chosen(self, candidate: WeightOnlyCandidate) -> dict[str, Option]:
        """The option of every group that `candidate` takes."""
        schemes = dict(candidate.schemes)
        options = {n: self.costs.options(n, candidate.lowp_mode, candidate.algorithm) for n in self.groups}
        return {name: next(o for o in each if o.scheme == schemes[name]) for name, each in options.items()}

    def _allowed(self, name: str, lowp_mode: WoqLowpMode, algorithm: str) -> list[Option]:
        """The options of a group that the space, the compute mode and `op_type_dict` allow."""
        options = self.costs.options(name, lowp_mode, algorithm)
        if name in self.always_float:
            return [option for option in options if option.scheme is None]
        schemes: list[WeightScheme | None] = list(self.space.schemes(lowp_mode))
        if self.head in self.groups[name]:
            schemes = [
                *(schemes if True in self.space.lm_head else []),
                *([None] if False in self.space.lm_head else []),
            ]
        return [option for option in options if option.scheme in schemes]

    def _share_groups(self, tables: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Groups of modules with one scheme, by the first name; layers that stay in float are alone.

        They are the layers that consume the same tensor, and a layer with the embeddings of `tables` that share its
        weight. An embedding that shares the weight of a layer in float stays in float.
        """
        with restored_forwards(self.model):
            traced = trace_groups(self.model, self.layers, (), partial(self.batches[0].run, self.model))
        together = [[name for name in group.members if name not in self.always_float] for group in traced]
        grouped = {name for members in together for name in members}
        together += [[name] for name in self.layers if name not in grouped]
        free = [name for name in tables if name not in self.always_float]
        for tied in tied_modules(self.model, [*self.layers, *free]):
            own, layers = ([name for name in tied if name in names] for names in (free, self.layers))
            free = [name for name in free if name not in own]
            if not layers:
                together.append(own)
            elif layers[0] not in self.always_float and (layers[0] != self.head or True in self.space.lm_head):
                next(members for members in together if layers[0] in members).extend(own)
        together += [[name] for name in free]
        return {members[0]: tuple(members) for members in together if members}

    # ----------------------------------------------------------------------------------------------- sizes and choices
    @property
    def _counts_all(self) -> bool:
        """Whether sizes count all of the model; those of `max_bytes_per_weight` count linear layers only."""
        return self.budget.max_bytes_per_weight is None

    def _other_bytes(self, members: Sequence[str]) -> int:
        """Bytes of the model without the weights of `members`."""
        weights = {id(w): w.nbytes for w in (self.model.get_submodule(name).weight for name in members)}
        return model_bytes(self.model) - sum(weights.values())

    def _limits(self) -> list[float]:
        """Bytes for all groups to try: the budget's, or steps from the smallest to the largest uniform choice."""
        if self.budget.max_bytes_per_weight is not None:
            return [self.budget.max_bytes_per_weight * self.weights]
        largest = max(
            self.rest + sum(option.bytes for option in choice.values())
            for lowp_mode in self.space.lowp_modes
            for choice in self._uniform(lowp_mode, "rtn")
        )
        highest = largest if self.budget.size is None else min(largest, self.budget.size)
        if self.budget.size is not None and self.budget == Budget(size=self.budget.size):
            sizes = [float(highest)]
        else:
            sizes = [float(self.rest + self._smallest())]
            while sizes[-1] < highest:
                sizes.append(min(sizes[-1] * SIZE_STEP, highest))
        return [size - self.rest for size in sizes]

    def _uniform(self, lowp_mode: WoqLowpMode, algorithm: str) -> Iterator[dict[str, Option]]:
        """Choices with one scheme for all layers, and each allowed choice for the output layer."""
        every = {name: self._allowed(name, lowp_mode, algorithm) for name in self.groups}
        for scheme in self.space.schemes(lowp_mode):
            for head_quantized in self.space.lm_head:
                choice = {}
                for name, options in every.items():
                    allowed = {option.scheme: option for option in options}
                    quantized = scheme in allowed and (head_quantized or self.head not in self.groups[name])
                    choice[name] = allowed[scheme if quantized else None]
                yield choice

    def _candidates(self, limit: float, lowp_mode: WoqLowpMode) -> Iterator[WeightOnlyCandidate]:
        """The mixed choice of least estimated error within `limit` bytes, then the uniform one, with each algorithm."""
        found: list[list[WeightOnlyCandidate]] = [[], []]
        for algorithm in self._algorithms():
            mixed = None
            if self.space.mixed:
                mixed = allocate({n: self._allowed(n, lowp_mode, algorithm) for n in self.groups}, limit)
            every = self._uniform(lowp_mode, algorithm)
            fitting = [each for each in every if sum(o.bytes for o in each.values()) <= limit]
            uniform = min(fitting, key=lambda each: sum(o.error for o in each.values())) if fitting else None
            for candidates, choice in zip(found, (mixed, uniform), strict=True):
                if choice is not None:
                    schemes = tuple((name, choice[n].scheme) for n, group in self.groups.items() for name in group)
                    candidates.append(WeightOnlyCandidate(algorithm, lowp_mode, schemes))
        yield from (candidate for candidates in found for candidate in candidates)

    def _algorithms(self) -> Sequence[str]:
        """The space's algorithms; if these are the default and the model has no transformer blocks, "rtn" alone."""
        if self.space.algorithms == ALGORITHMS:
            try:
                find_blocks(self.model)
            except ValueError:
                return ("rtn",)
        return self.space.algorithms

    def _smallest(self) -> int:
        """Bytes of the groups' smallest options."""
        return min(
            sum(min(option.bytes for option in self._allowed(name, lowp_mode, "rtn")) for name in self.groups)
            for lowp_mode in self.space.lowp_modes
        )

    def _too_small(self) -> str:
        """Why there is no candidate."""
        if self.budget.max_bytes_per_weight is not None:
            return (
                f"max_bytes_per_weight: {self.budget.max_bytes_per_weight:g} is too few for all of the schemes; the "
                f"smallest take {self._smallest() / self.weights:.4f}"
            )
        return (
            f"size: {self.budget.size} bytes are too few for all of the schemes; the smallest take "
            f"{self.rest + self._smallest()}, {self.rest / 1e6:.1f} MB of them for what stays in float"
        )


def find_weights(
    model: nn.Module,
    batches: Sequence[Example],
    candidate: WeightOnlyCandidate,
    options: Any = None,
    work_dir: Path | None = None,
) -> FoundWeights:
    """The weights of the layers and embeddings of `candidate`: those that its algorithm finds, the others rounded.

    GPTQ, AWQ and AutoRound find those of layers in transformer blocks, with `options` of their own; GPTQ and AutoRound
    skip layers whose dtype they do not support. `work_dir` is that of `auto_round_blocks`.
    """
    schemes = {name: scheme for name, scheme in candidate.schemes if scheme is not None}
    found = FoundWeights()
    if candidate.algorithm != "rtn":
        inputs = [batch.by_name(model) for batch in batches]
        suited = {name: scheme for name, scheme in schemes.items() if not scheme.dtype.is_float}
        narrow = all(fits_half(matrix_of(model.get_submodule(name)), scheme) for name, scheme in suited.items())
        scale_dtype = torch.float16 if narrow else torch.float32
        if candidate.algorithm == "awq":
            result = awq_blocks(model, inputs, schemes.get, options or AwqOptions(scale_dtype=scale_dtype))
            found = FoundWeights(result.weights, result.parameters)
        elif candidate.algorithm == "auto_round":
            options = options or AutoRoundOptions(scale_dtype=scale_dtype)
            found = FoundWeights(auto_round_blocks(model, inputs, suited.get, options, work_dir))
        else:
            options = options or GptqOptions(scale_dtype=scale_dtype)
            found = FoundWeights(quantize_blocks(model, inputs, suited.get, options))
    others = {name: scheme for name, scheme in schemes.items() if name not in found.weights}
    weights = {name: rounded(matrix_of(model.get_submodule(name)), scheme) for name, scheme in others.items()}
    return FoundWeights({**found.weights, **weights}, found.parameters)


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
            qconfig = layer_qconfig(
                scheme.dtype, scheme.group_size, scheme.qscheme, candidate.lowp_mode, act_quant_mode
            )
        mapping.set_module_name(name, qconfig)
    prepared = prepare(model, mapping, inplace=inplace)
    found.put_into(prepared)
    return convert(prepared, inplace=True)
