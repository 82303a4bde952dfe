"""One calibration pass for all candidates: ranges, histograms and a sample of each share group's input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from tqdm import tqdm

from ..conversion.example import Example
from ..conversion.observed import ObservedGroup, observed
from ..conversion.prepare import prepare
from ..conversion.qconfig import get_smooth_quant_qconfig_mapping
from ..llm.cache.naming import CACHE_NAMES
from ..nn.linears import is_linear
from ..nn.modes import evaluating
from ..numerics.reservoir import Reservoir
from ..observers import SmoothQuantActivationObserver, has_data, observe
from ..woq.towers import find_blocks

SAMPLE_ROWS = 128
"""Number of input vectors kept for each share group of linear layers; of convolutions, `SAMPLE_IMAGES` inputs."""

SAMPLE_IMAGES = 4

_CACHE_ARGUMENTS = ("past_key_value", *CACHE_NAMES, "use_cache", "layer_past")


class RecordingObserver(SmoothQuantActivationObserver):
    """Observes an activation as a whole and per channel, and keeps a uniform sample of its vectors, drawn by `seed`.

    For a smoothed layer the sample comes from one half of the data, and `other_half` observes the channels of the other
    half. The error of clipping shows only on values that the ranges were not found from.
    """

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.other_half = copy.deepcopy(self.ic_obs)
        self.seed = seed
        self.seen = 0
        self.calls = 0
        self.drawn: Reservoir | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        observe(self.act_obs, x)
        if self.smooth_quant_enabled:
            vectors = x.detach().reshape(-1, x.shape[-1])
            observe(self.ic_obs, vectors)
            halves = vectors.tensor_split(2)
            observe(self.other_half, halves[self.calls % 2])
            self._draw(halves[1 - self.calls % 2], SAMPLE_ROWS)
            self.calls += 1
        else:
            self._draw(x.detach(), SAMPLE_IMAGES)
        return x

    def _draw(self, vectors: torch.Tensor, rows: int) -> None:
        self.drawn = self.drawn or Reservoir(rows)
        self.drawn.add(vectors, torch.Generator().manual_seed(self.seed * 1_000_003 + self.seen))
        self.seen += len(vectors)


class CalibrationPass:
    """Results of the pass: observers by number of samples and share group, samples of inputs, calls of blocks."""

    def __init__(self, model: nn.Module, example: Example, groups: Sequence[ObservedGroup]) -> None:
        self.model, self.example = model, example
        self.groups = list(groups)
        self.samples: dict[str, torch.Tensor] = {}
        self.block_calls: dict[str, Example] = {}
        self.observers: dict[int, dict[str, SmoothQuantActivationObserver]] = {}

    def snapshot(self, samples: int) -> None:
        """Keep copies of the observers after `samples` samples."""
        self.observers[samples] = {
            group.name: _without_sample(group.observer) for group in self.groups if has_data(group.observer)
        }


def collect(
    model: nn.Module,
    batches: Sequence[Example],
    sampling_sizes: Sequence[int],
    calib_func: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
    blocks: bool = False,
) -> CalibrationPass:
    """Prepare a copy of `model` that shares its parameters, and run `batches`, or `calib_func`, on it.

    The prepared copy is the `model` of the result. Observers are kept for each of `sampling_sizes`; of sizes beyond the
    data only the smallest is used, for all the data. The samples of `calib_func` cannot be counted and give the last
    size. With `blocks` the first call of each transformer block is kept. Raises ValueError if no layer is reached.
    """
    prepared = prepare(
        model, _recording_mapping(seed), batches[0].args or None, example_kwarg_inputs=batches[0].kwargs or None
    )
    found = CalibrationPass(prepared, batches[0], observed(prepared).static_groups)
    with evaluating(prepared), torch.no_grad(), _watched_blocks(prepared, found.block_calls if blocks else None):
        if calib_func is not None:
            calib_func(prepared)
            found.snapshot(sampling_sizes[-1])
        else:
            _run(prepared, batches, sampling_sizes, found)
    if not any(found.observers.values()):
        raise ValueError("calibration: none of the layers to quantize was reached; check calib_dataloader, calib_func")
    for group in found.groups:
        if group.observer.drawn is not None:
            found.samples[group.name] = group.observer.drawn.rows
        group.reset()
    return found


def _run(
    prepared: nn.Module, batches: Sequence[Example], sampling_sizes: Sequence[int], found: CalibrationPass
) -> None:
    wanted = sorted(sampling_sizes)
    done = 0
    for batch in tqdm(batches, "calibrating"):
        batch.run(prepared)
        done += batch.sample_count
        while wanted and done >= wanted[0]:
            found.snapshot(wanted.pop(0))
    if wanted:
        found.snapshot(wanted[0])


@contextmanager
def _watched_blocks(model: nn.Module, calls: dict[str, Example] | None) -> Iterator[None]:
    """Record the first call of every transformer block in `calls`, without its cache."""
    handles: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        handles.pop(name).remove()
        calls[name] = Example(args, {key: value for key, value in kwargs.items() if key not in _CACHE_ARGUMENTS})

    if calls is not None:
        prefix, blocks = find_blocks(model)
        for index, block in enumerate(blocks):
            name = f"{prefix}.{index}"
            handles[name] = block.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()


def _recording_mapping(seed: int) -> QConfigMapping:
    mapping = get_smooth_quant_qconfig_mapping()
    qconfig = mapping.global_qconfig
    return mapping.set_global(qconfig._replace(activation=RecordingObserver.with_args(seed=seed)))


def _without_sample(observer: RecordingObserver) -> RecordingObserver:
    kept = copy.copy(observer)
    kept.drawn = None
    return copy.deepcopy(kept)


def is_smoothed(group: ObservedGroup, model: nn.Module) -> bool:
    """Whether the layers of a group are linear, so that SmoothQuant applies."""
    return is_linear(model.get_submodule(group.name))
