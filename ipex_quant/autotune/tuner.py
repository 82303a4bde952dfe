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

from ..conversion.rules import choose_qconfigs
from ..evaluation import model_bytes
from ..numerics.digest import tensor_digest
from .agreement import agreement
from .batches import read_batches
from .calibration_pass import collect
from .candidate import Int8Candidate, WeightOnlyCandidate
from .constraints import float_layers
from .criterion import Criterion, measured
from .loop import run_trials
from .report import Report, checked_report_path
from .search import Search, best_trial
from .sizes import decode_step_ms, read_bandwidth, weight_bytes
from .smoothquant_args import read_smoothquant_args
from .static import StaticQuantizer
from .trials import Trial, TrialRecord
from .weight_only import WeightOnlyQuantizer, WeightOnlySpace

logger = logging.getLogger("ipex_quant")

DEFAULT_SAMPLING_SIZES = (100,)

_CANDIDATES: dict[str, Any] = {"int8": Int8Candidate, "weight_only": WeightOnlyCandidate}


class Quantizer(Protocol):
    """The interface of a way to quantize, as the tuner uses it."""

    def search(self) -> Search:
        """A generator of the candidates to try."""

    def quantized(self, candidate: Any) -> nn.Module:
        """A new model quantized by `candidate`."""

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
    record: str | os.PathLike | None = None,
    report: str | os.PathLike | Sequence[str | os.PathLike] = (),
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Find the best quantization of `model` within an accuracy budget: static INT8, or weight-only.

    Every trial quantizes a copy, with real kernels, and measures its metric. For static INT8 it first tries all layers
    in INT8, then the best of these candidates with its most sensitive layers left in float, until one meets the
    criterion; one calibration pass serves all. The result is a prepared model with the parameters loaded: ``convert``
    it, or save the parameters with its ``save_qconf_summary`` for ``llm.optimize``.

    With a `quantization_config` or `max_bytes_per_weight` only weights are quantized, and the result is the quantized
    model, ready for ``llm.optimize`` and ``llm.save``. Layers may get different schemes, so that the estimated
    divergence is least: within `max_bytes_per_weight`, an average over all linear layers, or else in the smallest size
    that meets the criterion.

    - `calib_dataloader` yields batches: a mapping, a tuple, a list or a tensor, or a pair of one of these and an index
      or label. Each sample is read once.
    - `calib_func(model)` runs calibration data through `model` instead of the dataloader's; for static INT8 only.
    - `eval_func(model)` returns the metric, a number; higher is better. The default metric is 1 minus the squared error
      of the outputs for the calibration data, relative to the float model's outputs.
    - `op_type_dict`: see `constraints.float_layers`; `smoothquant_args`: see `smoothquant_args.read_smoothquant_args`.
    - `sampling_sizes` are the numbers of samples to calibrate on, [100] by default; static INT8 tries each.
    - `accuracy_criterion` is ``{"relative": 0.01}``, the default, or ``{"absolute": ...}``: the largest loss allowed.
    - `tuning_time` in seconds: with 0, tuning ends at the first candidate that meets the criterion; otherwise it
      continues to find a smaller or more accurate one until the time is over or all candidates are tried.
    - `quantization_config`: a `WeightOnlySpace`, or a weight-only mapping; of a mapping only the global configuration
      is tried, and layers that its rules leave in float stay in float.
    - `record` is a file for the trials, replaced atomically after each. If it exists, tuning resumes after its trials.
    - `report` names files for the `Report`: .html, .json, or .svg for its plot of metric against size.
    - `seed` draws the samples of the layers' inputs. With the same seed and data, trials and result are the same.

    `model` is unchanged unless `inplace`. Warns, with the gap, if no candidate meets the criterion; the result is then
    the most accurate one. As in IPEX 2.8, `sampling_sizes`, `accuracy_criterion` and `tuning_time` may be the sixth and
    following positional arguments. Raises TypeError or ValueError for bad arguments and for a metric that is no finite
    number, ImportError for a report as .svg without matplotlib.
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
    record: str | os.PathLike | None = None
    report: str | os.PathLike | Sequence[str | os.PathLike] = ()
    seed: int = 0
    inplace: bool = False

    @property
    def weight_only(self) -> bool:
        """Whether only weights are quantized."""
        return self.quantization_config is not None or self.max_bytes_per_weight is not None

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
    criterion = Criterion.of(options.accuracy_criterion)
    sizes = _checked_sizes(options.sampling_sizes)
    always_float = float_layers(model, options.op_type_dict)
    alphas, alpha_search = read_smoothquant_args(options.smoothquant_args)
    space, max_bytes = WeightOnlySpace.of(options.quantization_config), options.max_bytes_per_weight
    if isinstance(options.quantization_config, QConfigMapping):
        always_float |= choose_qconfigs(options.quantization_config, model)[1].keys()
    batches = read_batches(model, calib_dataloader, sizes[-1])

    identity = {
        "criterion": str(criterion),
        "space": repr((space, max_bytes) if options.weight_only else (alphas, alpha_search)),
        "sampling_sizes": list(sizes),
        "float": sorted(always_float),
        "seed": options.seed,
        "model": tensor_digest(model.state_dict().items()),
        "data": tensor_digest((str(i), tensor) for i, batch in enumerate(batches) for tensor in batch.tensors()),
    }
    trials = TrialRecord(options.record, identity)
    eval_func = options.eval_func or agreement(model, batches)
    measure = _Measure(eval_func, criterion, _baseline(model, eval_func, criterion, trials))
    start = time.perf_counter()
    quantizer: Quantizer
    if options.weight_only:
        quantizer = WeightOnlyQuantizer(model, batches, space, max_bytes, always_float, options.seed)
    else:
        calibration = collect(model, batches, sizes, options.calib_func, options.seed, alpha_search.by_block)
        quantizer = StaticQuantizer(calibration, alphas, alpha_search, always_float)

    search = quantizer.search()
    setup = time.perf_counter() - start

    def is_over() -> bool:
        seconds = options.tuning_time
        return setup + trials.seconds >= seconds if seconds > 0 else trials.trials[-1].met

    done = run_trials(search, lambda candidate, index: measure(quantizer, candidate, index), trials, is_over)
    best = best_trial(done, quantizer.cost)
    candidate = _CANDIDATES[best.recipe["kind"]].from_json(best.recipe)
    trials.finish(best, quantizer.sensitivity(candidate))
    report = Report(trials.baseline, str(criterion), best.index, done, trials.sensitivity)
    logger.info("autotune:\n%s", report.table())
    for path in reports:
        report.write(path)
    if not best.met:
        warnings.warn(
            f"autotune: no candidate of {len(done)} meets the criterion, a loss of at most {criterion}: the best, "
            f"{best.label}, loses {best.loss:.4g}, {best.loss - criterion.tolerance:.4g} too much",
            stacklevel=3,
        )
    return quantizer.result(model, candidate, options.inplace), report


@dataclass
class _Measure:
    """Quantizes and measures a candidate, and returns its trial."""

    eval_func: Callable[[nn.Module], float]
    criterion: Criterion
    baseline: float
    _bandwidth: float | None = None

    def __call__(self, quantizer: Quantizer, candidate: Any, index: int) -> Trial:
        start = time.perf_counter()
        model = quantizer.quantized(candidate)
        metric = measured(self.eval_func, model)
        loss = self.criterion.loss(self.baseline, metric)
        read, weights = weight_bytes(model)
        step = decode_step_ms(model)
        self._bandwidth = self._bandwidth or read_bandwidth()
        return Trial(
            index=index,
            recipe=candidate.to_json(),
            label=str(candidate),
            metric=metric,
            loss=loss,
            met=self.criterion.met(loss),
            model_bytes=model_bytes(model),
            bytes_per_weight=read / weights,
            predicted_ms=None if step is None else 1e3 * read / self._bandwidth,
            measured_ms=step,
            seconds=time.perf_counter() - start,
        )


def _check_arguments(model: Any, options: TuningOptions) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name in ("calib_func", "eval_func"):
        function = getattr(options, name)
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function of the model, got {type(function).__name__}")
    tuning_time, size = options.tuning_time, options.max_bytes_per_weight
    if isinstance(tuning_time, bool) or not isinstance(tuning_time, (int, float)) or not tuning_time >= 0:
        raise ValueError(f"tuning_time: expected seconds, at least 0, got {tuning_time!r}")
    if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float)) or not size > 0):
        raise ValueError(f"max_bytes_per_weight: expected a number above 0, got {size!r}")
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
