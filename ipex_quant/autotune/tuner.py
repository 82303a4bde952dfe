"""`autotune`: find the best quantization of a model within an accuracy budget."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import PreTrainedModel

from .. import llm
from ..conversion.example import Example
from ..conversion.rules import choose_qconfigs
from ..evaluation import model_bytes
from ..numerics.digest import tensor_digest
from .agreement import agreement, divergence, has_logits
from .batches import read_batches
from .budget import Budget, parse_size
from .calibration_pass import collect
from .candidate import Int8Candidate, WeightOnlyCandidate
from .constraints import float_layers
from .criterion import Criterion, measured
from .loop import run_trials
from .report import Report, checked_report_path
from .search import Search, best_trial
from .sizes import decode_step_ms, read_bandwidth, weight_bytes
from .smoothquant_args import read_smoothquant_args
from .space import WeightOnlySpace
from .static import StaticQuantizer
from .trials import Trial, TrialRecord
from .weight_only import WeightOnlyQuantizer

logger = logging.getLogger("ipex_quant")

DEFAULT_SAMPLING_SIZES = (100,)

_CANDIDATES: dict[str, Any] = {"int8": Int8Candidate, "weight_only": WeightOnlyCandidate}


class Quantizer(Protocol):
    """The interface of a way to quantize, as the tuner uses it."""

    def search(self) -> Search:
        """A generator of the candidates to try."""

    def quantized(self, candidate: Any) -> nn.Module:
        """A new model quantized by `candidate`."""

    def predicted(self, candidate: Any) -> float | None:
        """The loss that is expected of `candidate`, None where nothing is."""

    def cost(self, trial: Trial) -> float:
        """A cost that counts before accuracy among the trials that meet the criterion; less is better."""

    def sensitivity(self, candidate: Any) -> dict[str, dict[str, Any]]:
        """Notes on the layers by name, their `error` first."""

    def result(self, model: nn.Module, candidate: Any, inplace: bool) -> nn.Module:
        """The model that `autotune` returns."""


def autotune(
    model: nn.Module,
    calib_dataloader: Iterable[Any],
    calib_func: Callable[[nn.Module], Any] | None = None,
    eval_func: Callable[[nn.Module], float] | None = None,
    op_type_dict: Mapping[str, Any] | None = None,
    smoothquant_args: Mapping[str, Any] | None = None,
    sampling_sizes: Sequence[int] | None = None,
    accuracy_criterion: Mapping[str, float] | None = None,
    tuning_time: float = 0,
    *,
    quantization_config: WeightOnlySpace | QConfigMapping | None = None,
    max_bytes_per_weight: float | None = None,
    size: int | str | None = None,
    max_kl: float | None = None,
    tokens_per_second: float | None = None,
    record: str | os.PathLike | None = None,
    report: str | os.PathLike | Sequence[str | os.PathLike] = (),
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Find the best quantization of `model` within a budget of accuracy, size or speed: static INT8, or weight-only.

    Every trial quantizes a copy, with real kernels, and measures its metric. For static INT8 it first tries all layers
    in INT8, then the best of these candidates with its most sensitive layers left in float, until one meets the
    criterion; one calibration pass serves all. The result is a prepared model with the parameters loaded: ``convert``
    it, or save the parameters with its ``save_qconf_summary`` for ``llm.optimize``.

    With a `quantization_config` or one of the budgets below only weights are quantized, and the result is the quantized
    model, ready for ``llm.optimize`` and ``llm.save``. Layers and embeddings may get different schemes, so that the
    estimated divergence is least. With a limit of accuracy, the result is the smallest model that keeps to it; with
    other budgets, the most accurate one within them.

    - `size`: bytes of all that the model stores, or a text as "120MB": output layer, embeddings and scales included.
    - `max_bytes_per_weight`: average over all linear layers.
    - `max_kl`: largest divergence from the float model in nats per token; an `eval_func` then returns minus that.
    - `tokens_per_second`: least speed of decoding on this machine, which short runs of candidates measure.

    - `calib_dataloader` yields batches: a mapping, a tuple, a list or a tensor, or a pair of one of these and an index
      or label. Each sample is read once.
    - `calib_func(model)` runs calibration data through `model` instead of the dataloader's; for static INT8 only.
    - `eval_func(model)` returns the metric, a number; higher is better. The default metric is 1 minus the squared error
      of the outputs for the calibration data, relative to the float model's outputs; with `size`, `max_kl` or
      `tokens_per_second` minus the divergence of the predictions for these data, where there are any.
    - `op_type_dict`: see `constraints.float_layers`; `smoothquant_args`: see `smoothquant_args.read_smoothquant_args`.
    - `sampling_sizes` are the numbers of samples to calibrate on, [100] by default; static INT8 tries each.
    - `accuracy_criterion` is ``{"relative": 0.01}`` or ``{"absolute": ...}``: the largest loss allowed. The former is
      the default, with `size` or `tokens_per_second` any loss.
    - `tuning_time` in seconds: with 0, tuning ends at the first candidate that meets the criterion, in a search for the
      smallest size when that is found; otherwise it continues to find a smaller or more accurate one, also with other
      algorithms, until the time is over or all candidates are tried.
    - `quantization_config`: a `WeightOnlySpace`, or a weight-only mapping; of a mapping only the global configuration
      is tried, and layers that its rules leave in float stay in float.
    - `record` is a file for the trials, replaced atomically after each. If it exists, tuning resumes after its trials.
    - `report` names files for the `Report`: .html, .json, or .svg for its plot of metric against size.
    - `seed` draws the samples of the layers' inputs. With the same seed and data, trials and result are the same.

    `model` is unchanged unless `inplace`. Warns, with the gap, if no candidate meets `accuracy_criterion`; the result
    is then the most accurate one. As in IPEX 2.8, `sampling_sizes`, `accuracy_criterion` and `tuning_time` may be the
    sixth and following positional arguments. Raises TypeError or ValueError for bad arguments and for a metric that is
    no finite number, ValueError for a budget that no scheme keeps to, with the least that one reaches, and ImportError
    for a report as .svg without matplotlib.
    """
    if isinstance(smoothquant_args, (list, tuple)) or isinstance(sampling_sizes, Mapping):  # the order of IPEX 2.8
        tuning_time = tuning_time if isinstance(accuracy_criterion, Mapping | None) else accuracy_criterion
        smoothquant_args, sampling_sizes, accuracy_criterion = None, smoothquant_args, sampling_sizes
    options = TuningOptions(
        calib_func=calib_func,
        eval_func=eval_func,
        op_type_dict=op_type_dict,
        smoothquant_args=smoothquant_args,
        sampling_sizes=sampling_sizes,
        accuracy_criterion=accuracy_criterion,
        tuning_time=tuning_time,
        quantization_config=quantization_config,
        max_bytes_per_weight=max_bytes_per_weight,
        size=size,
        max_kl=max_kl,
        tokens_per_second=tokens_per_second,
        record=record,
        report=report,
        seed=seed,
        inplace=inplace,
    )
    return tune(model, calib_dataloader, options)[0]


@dataclass(frozen=True)
class TuningOptions:
    """The options of `autotune`, with their defaults."""

    calib_func: Callable[[nn.Module], Any] | None = None
    eval_func: Callable[[nn.Module], float] | None = None
    op_type_dict: Mapping[str, Any] | None = None
    smoothquant_args: Mapping[str, Any] | None = None
    sampling_sizes: Sequence[int] | None = None
    accuracy_criterion: Mapping[str, float] | None = None
    tuning_time: float = 0
    quantization_config: WeightOnlySpace | QConfigMapping | None = None
    max_bytes_per_weight: float | None = None
    size: int | str | None = None
    max_kl: float | None = None
    tokens_per_second: float | None = None
    record: str | os.PathLike | None = None
    report: str | os.PathLike | Sequence[str | os.PathLike] = ()
    seed: int = 0
    inplace: bool = False

    @property
    def budget(self) -> Budget:
        """The limits of a weight-only search; TypeError or ValueError for those that are no such."""
        size = None if self.size is None else parse_size(self.size)
        return Budget(self.max_bytes_per_weight, size, self.max_kl, self.tokens_per_second)

    @property
    def weight_only(self) -> bool:
        """Whether only weights are quantized."""
        return self.quantization_config is not None or self.budget.any

    @property
    def criterion(self) -> Criterion:
        """The loss that is allowed; TypeError or ValueError for another form, and for two limits of accuracy."""
        if self.max_kl is not None:
            if self.accuracy_criterion is not None:
                raise ValueError("max_kl, accuracy_criterion: both say what loss is allowed; leave one of them out")
            return Criterion(False, self.max_kl)
        if self.accuracy_criterion is None and self.budget.without_accuracy:
            return Criterion()
        return Criterion.of(self.accuracy_criterion)

    @property
    def reports(self) -> list[Path]:
        """The report files; ValueError for a file that cannot be written."""
        one = isinstance(self.report, (str, os.PathLike))
        return [checked_report_path(path) for path in ([self.report] if one else self.report)]


def tune(
    model: nn.Module, calib_dataloader: Iterable[Any], options: TuningOptions | None = None
) -> tuple[nn.Module, Report]:
    """The result of `autotune`, and the report of its search."""
    options = options or TuningOptions()
    _check_arguments(model, options)
    reports = options.reports
    budget, criterion = options.budget, options.criterion
    sizes = _checked_sizes(options.sampling_sizes)
    always_float = float_layers(model, options.op_type_dict)
    alphas, alpha_search = read_smoothquant_args(options.smoothquant_args)
    space = WeightOnlySpace.of(options.quantization_config)
    if isinstance(options.quantization_config, QConfigMapping):
        always_float |= choose_qconfigs(options.quantization_config, model)[1].keys()
    batches = read_batches(model, calib_dataloader, sizes[-1])

    identity = {
        "criterion": str(criterion),
        "space": repr((space, budget) if options.weight_only else (alphas, alpha_search)),
        "sampling_sizes": list(sizes),
        "float": sorted(always_float),
        "seed": options.seed,
        "model": tensor_digest(model.state_dict().items()),
        "data": tensor_digest((str(i), tensor) for i, batch in enumerate(batches) for tensor in batch.tensors()),
    }
    trials = TrialRecord(options.record, identity)
    eval_func = options.eval_func or _default_metric(model, batches, budget)
    measure = _Measure(eval_func, criterion, budget, _baseline(model, eval_func, criterion, trials))
    start = time.perf_counter()
    quantizer: Quantizer
    if options.weight_only:
        tolerance, thorough = criterion.tolerance, options.tuning_time > 0
        quantizer = WeightOnlyQuantizer(model, batches, space, budget, always_float, options.seed, tolerance, thorough)
    else:
        calibration = collect(model, batches, sizes, options.calib_func, options.seed, alpha_search.by_block)
        quantizer = StaticQuantizer(calibration, alphas, alpha_search, always_float)

    search = quantizer.search()
    setup = time.perf_counter() - start

    def is_over() -> bool:
        if options.tuning_time > 0:
            return setup + trials.seconds >= options.tuning_time
        return trials.trials[-1].met and not options.weight_only  # whose search ends by itself

    done = run_trials(search, lambda candidate, index: measure(quantizer, candidate, index), trials, is_over)
    best = best_trial(done, quantizer.cost)
    if not best.met and budget.max_kl is not None:
        raise ValueError(
            f"max_kl: {budget.max_kl:g} is less than any scheme reaches within the budget: the least, {best.loss:.4g}, "
            f"is that of {best.label}, {best.model_bytes / 1e6:.1f} MB"
        )
    candidate = _CANDIDATES[best.recipe["kind"]].from_json(best.recipe)
    trials.finish(best, quantizer.sensitivity(candidate))
    report = Report(trials.baseline, str(criterion), best.index, done, trials.sensitivity)
    logger.info("autotune:\n%s", report.table())
    for path in reports:
        report.write(path)
    if not best.met:
        lacks = f"is within the budget: the best, {best.label}, takes {best.model_bytes / 1e6:.2f} MB"
        if not criterion.met(best.loss):
            lacks = (
                f"meets the criterion, a loss of at most {criterion}: the best, {best.label}, loses {best.loss:.4g}, "
                f"{best.loss - criterion.tolerance:.4g} too much"
            )
        elif best.measured_ms is not None:
            lacks += f" and {best.measured_ms:.3g} ms for a token"
        warnings.warn(f"autotune: no candidate of {len(done)} {lacks}", stacklevel=3)
    return quantizer.result(model, candidate, options.inplace), report


@dataclass
class _Measure:
    """Quantizes and measures a candidate, and returns its trial."""

    eval_func: Callable[[nn.Module], float]
    criterion: Criterion
    budget: Budget
    baseline: float
    _bandwidth: float | None = None

    def __call__(self, quantizer: Quantizer, candidate: Any, index: int) -> Trial:
        start = time.perf_counter()
        predicted = quantizer.predicted(candidate)
        model = quantizer.quantized(candidate)
        try:
            metric = measured(self.eval_func, model)
        except ValueError as error:
            raise ValueError(f"trial {index}, {candidate}: {error}") from error
        loss = self.criterion.loss(self.baseline, metric)
        read, weights = weight_bytes(model)
        size = model_bytes(model)
        step = decode_step_ms(_as_it_generates(model))
        self._bandwidth = self._bandwidth or read_bandwidth()
        return Trial(
            index=index,
            recipe=candidate.to_json(),
            label=str(candidate),
            metric=metric,
            loss=loss,
            predicted_loss=predicted,
            met=self.criterion.met(loss) and self._within(size, step),
            model_bytes=size,
            bytes_per_weight=read / weights,
            predicted_ms=None if step is None else 1e3 * read / self._bandwidth,
            measured_ms=step,
            seconds=time.perf_counter() - start,
        )

    def _within(self, size: int, step_ms: float | None) -> bool:
        """Whether a model of `size` bytes and `step_ms` for a decode step is within the budget."""
        speed = self.budget.tokens_per_second
        small = self.budget.size is None or size <= self.budget.size
        return small and (speed is None or (step_ms is not None and step_ms * speed <= 1e3))


def _as_it_generates(model: nn.Module) -> nn.Module:
    """`model` as users run it, if it generates: with native attention and fused layers."""
    if isinstance(model, PreTrainedModel) and model.can_generate():
        return llm.optimize(model, dtype=model.dtype, inplace=True)
    return model


def _default_metric(model: nn.Module, batches: Sequence[Example], budget: Budget) -> Callable[[nn.Module], float]:
    if not (budget.without_accuracy or budget.max_kl is not None) or (
        budget.max_kl is None and not has_logits(model, batches[0])
    ):
        return agreement(model, batches)
    return divergence(model, batches)


def _check_arguments(model: Any, options: TuningOptions) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name in ("calib_func", "eval_func"):
        function = getattr(options, name)
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function of the model, got {type(function).__name__}")
    tuning_time = options.tuning_time
    if isinstance(tuning_time, bool) or not isinstance(tuning_time, (int, float)) or not tuning_time >= 0:
        raise ValueError(f"tuning_time: expected seconds, at least 0, got {tuning_time!r}")
    if options.max_bytes_per_weight is not None and options.size is not None:
        raise ValueError("size, max_bytes_per_weight: both say how large the model may be; leave one of them out")
    if options.weight_only and (options.smoothquant_args is not None or options.calib_func is not None):
        raise ValueError("smoothquant_args, calib_func: they are for static INT8; leave them out to quantize weights")


def _checked_sizes(sampling_sizes: Sequence[int] | None) -> tuple[int, ...]:
    sizes = DEFAULT_SAMPLING_SIZES if sampling_sizes is None else sampling_sizes
    sizes = [sizes] if isinstance(sizes, int) else sizes
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise TypeError(f"sampling_sizes: expected a list of numbers of samples, got {sampling_sizes!r}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"sampling_sizes: expected positive integers, got {size!r}")
    return tuple(sorted(set(sizes)))


def _baseline(
    model: nn.Module, eval_func: Callable[[nn.Module], float], criterion: Criterion, trials: TrialRecord
) -> float:
    """The float model's metric, measured unless the record has it from an earlier run."""
    if trials.baseline is None:
        start = time.perf_counter()
        metric = measured(eval_func, model)
        criterion.check_baseline(metric)
        trials.set_baseline(metric, time.perf_counter() - start)
    return trials.baseline
