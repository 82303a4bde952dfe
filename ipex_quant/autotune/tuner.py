"""`autotune`: the best recipe within an accuracy budget."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..evaluation import model_bytes
from ..nn.linears import is_linear
from .agreement import agreement
from .batches import read_batches, tensors
from .constraints import float_layers
from .criterion import Criterion, measured
from .loop import run_trials
from .recipe import Int8Recipe
from .search import Layer, best_trial, search_int8
from .sizes import decode_step_ms, read_bandwidth, weight_bytes
from .smoothing import read_smoothquant_args
from .static import StaticQuantizer
from .statistics import collect
from .trials import Trial, TrialRecord

logger = logging.getLogger("ipex_quant")

DEFAULT_SAMPLING_SIZES = (100,)


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
    seed: int = 0,
    inplace: bool = False,
    record: str | os.PathLike | None = None,
) -> nn.Module:
    """Find how to quantize `model` to static INT8 within an accuracy budget, and return it prepared that way.

    Every trial converts a copy to real INT8 and measures it: first recipes with all layers in INT8, then the best of
    them with the most sensitive layers left in float, until one meets the criterion. One calibration pass serves all.

    - `calib_dataloader` yields batches: a mapping, a tuple, a list or a tensor, or a pair of one of these and an index
      or label. Each sample is read once.
    - `calib_func(model)` runs calibration data through the model it is given, in place of the dataloader's.
    - `eval_func(model)` returns a number of which more is better. Without it, it is 1 less the squared error of the
      outputs for the calibration data relative to the float model's.
    - `op_type_dict`: see `constraints.float_layers`; `smoothquant_args`: see `smoothing.read_smoothquant_args`.
    - `sampling_sizes` are the numbers of samples to calibrate on, each a recipe of its own; [100] by default.
    - `accuracy_criterion` is ``{"relative": 0.01}``, the default, or ``{"absolute": ...}``: the largest loss allowed.
    - `tuning_time`: 0 ends at the first recipe that meets the criterion; seconds above it go on looking for a smaller
      or a more accurate one until they are over.
    - `seed` draws the samples of the layers' inputs. With the same seed and data, trials and result are the same.
    - `record` is a file for the trials. If it exists, tuning goes on after the trials it holds.

    The result is what `prepare` makes, with the parameters loaded; ``convert`` it, or save them by its
    ``save_qconf_summary`` for ``llm.optimize``. `model` is unchanged unless `inplace`. Warns, naming the gap, when no
    recipe meets the criterion: the result is the most accurate then. A list as sixth argument is `sampling_sizes`, and
    the arguments after it follow, as in IPEX 2.8. Raises TypeError or ValueError for bad arguments and for a metric
    that is no finite number, ImportError without neural-compressor.
    """
    if isinstance(smoothquant_args, (list, tuple)) or _looks_like_criterion(sampling_sizes):  # as IPEX 2.8 has it
        tuning_time = accuracy_criterion if isinstance(accuracy_criterion, (int, float)) else tuning_time
        smoothquant_args, sampling_sizes, accuracy_criterion = None, smoothquant_args, sampling_sizes
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, function in (("calib_func", calib_func), ("eval_func", eval_func)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function of the model, got {type(function).__name__}")
    if isinstance(tuning_time, bool) or not isinstance(tuning_time, (int, float)) or not tuning_time >= 0:
        raise ValueError(f"tuning_time: expected seconds, at least 0, got {tuning_time!r}")
    criterion = Criterion.of(accuracy_criterion)
    sizes = _checked_sizes(sampling_sizes)
    alphas, alpha_search = read_smoothquant_args(smoothquant_args)
    always_float = float_layers(model, op_type_dict)
    batches = read_batches(model, calib_dataloader, sizes[-1])
    eval_func = eval_func or agreement(model, batches)
    identity = {
        "criterion": str(criterion),
        "alphas": list(alphas),
        "alpha_search": repr(alpha_search),
        "sampling_sizes": list(sizes),
        "float": sorted(always_float),
        "seed": seed,
        "model": _digest(model.state_dict().items()),
        "data": _digest((str(i), tensor) for i, batch in enumerate(batches) for tensor in tensors(batch)),
    }
    trials = TrialRecord(record, identity)
    baseline = _baseline(model, eval_func, trials)
    criterion.check_baseline(baseline)

    quantizer = StaticQuantizer(collect(model, batches, sizes, calib_func, seed), alpha_search)
    if always_float >= set(quantizer.layers):
        raise ValueError("op_type_dict: it leaves all layers in float, so that there is nothing to tune")
    recipes = [
        Int8Recipe(alpha, samples, tuple(sorted(always_float & set(quantizer.layers))))
        for samples in quantizer.statistics.observers
        for alpha in alphas
    ]
    recipes.sort(key=lambda recipe: sum(quantizer.plan(recipe).errors.values()))
    bandwidth = read_bandwidth()

    def measure(recipe: Int8Recipe, index: int) -> Trial:
        start = time.perf_counter()
        candidate = quantizer.quantized(recipe)
        metric = measured(eval_func, candidate)
        loss = criterion.loss(baseline, metric)
        read, weights = weight_bytes(candidate)
        step = decode_step_ms(candidate)
        return Trial(
            index=index,
            recipe=recipe.to_json(),
            label=str(recipe),
            metric=metric,
            loss=loss,
            met=criterion.met(loss),
            model_bytes=model_bytes(candidate),
            bytes_per_weight=read / weights,
            predicted_ms=None if step is None else 1e3 * read / bandwidth,
            measured_ms=step,
            seconds=time.perf_counter() - start,
        )

    layers = {recipe: _layers(quantizer, recipe) for recipe in recipes}
    done = run_trials(search_int8(recipes, layers, always_float), measure, trials, tuning_time)
    best = best_trial(done, lambda trial: len(trial.recipe["float_modules"]))
    recipe = Int8Recipe.from_json(best.recipe)
    trials.finish(best, _sensitivity(quantizer, recipe))
    if not best.met:
        warnings.warn(
            f"autotune: no recipe of {len(done)} meets the criterion, a loss of at most {criterion}: the best, "
            f"{best.label}, loses {best.loss:.4g}, {best.loss - criterion.tolerance:.4g} too much",
            stacklevel=2,
        )
    return quantizer.prepared(model, recipe, batches[0], inplace)


def _looks_like_criterion(value: Any) -> bool:
    return isinstance(value, Mapping)


def _checked_sizes(sampling_sizes: Sequence[int] | None) -> tuple[int, ...]:
    sizes = DEFAULT_SAMPLING_SIZES if sampling_sizes is None else sampling_sizes
    sizes = [sizes] if isinstance(sizes, int) else sizes
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise TypeError(f"sampling_sizes: expected a list of numbers of samples, got {sampling_sizes!r}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"sampling_sizes: expected positive integers, got {size!r}")
    return tuple(sorted(set(sizes)))


def _baseline(model: nn.Module, eval_func: Callable[[nn.Module], float], trials: TrialRecord) -> float:
    if trials.baseline is None:
        start = time.perf_counter()
        trials.set_baseline(measured(eval_func, model), time.perf_counter() - start)
    return trials.baseline


def _digest(tensors_by_name: Iterable[tuple[str, Any]]) -> str:
    """Of names, shapes, dtypes and some values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors_by_name:
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 256)].double()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {some.tolist()}".encode())
    return digest.hexdigest()[:16]


def _layers(quantizer: StaticQuantizer, recipe: Int8Recipe) -> list[Layer]:
    modules = dict(quantizer.model.named_modules())
    return [
        Layer(name, _type(name, modules[name]), error, modules[name].weight.numel())
        for name, error in quantizer.plan(recipe).errors.items()
    ]


def _type(name: str, module: nn.Module) -> str:
    """What a layer has in common with others: its name in its parent, or its class where it only has a number."""
    own = name.rpartition(".")[2]
    return own if is_linear(module) and not own.isdecimal() else type(module).__name__


def _sensitivity(quantizer: StaticQuantizer, recipe: Int8Recipe) -> dict[str, dict[str, Any]]:
    plan = quantizer.plan(recipe)
    return {name: {"error": plan.errors[name], "alpha": plan.alphas[name]} for name in plan.errors}
