"""`calibrate`: run data through a prepared model, resumably and in several processes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from ..nn.modes import evaluating
from ..numerics.digest import tensor_digest
from ..observers import check_reducible, describe_observer, reduce_observer
from ..reading import shown
from ..writing import check_writable, write_whole
from .example import Example
from .observed import observed


def calibrate(
    prepared: nn.Module, dataloader: Iterable[Any], checkpoint: str | Path | None = None, save_every: int = 16
) -> nn.Module:
    """Run every batch of `dataloader` through `prepared`, without gradients and in eval mode, and return it.

    A batch is a mapping, tuple, list or tensor, as `Example.of_item` reads it. With `checkpoint`, a file, the
    statistics of the observers are saved atomically after every `save_every` batches, at the end and when a batch
    fails; if the file exists, calibration resumes after the batches that it counts, with bit-equal results. If
    torch.distributed is initialised, rank r runs the batches r, r + world size, ... of the same dataloader, each rank
    has a file of its own, and in the end all ranks hold the statistics of all batches. Raises ValueError for a batch
    that the forward does not accept, no batches at all, or the checkpoint of another model, and RuntimeError if
    `prepared` is not prepared or another rank failed.
    """
    observers = observed(prepared).observers()
    if not isinstance(save_every, int) or save_every < 1:
        raise ValueError(f"save_every: expected a positive integer, got {save_every!r}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    for observer in observers.values() if world > 1 else ():
        check_reducible(observer)
        if rank > 0 and hasattr(observer, "reset"):  # statistics that all ranks already have must count once
            observer.reset()
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and world > 1:
        path = path.with_name(f"{path.name}.rank{rank}-of-{world}")
    identity = "" if path is None else _identity(prepared, observers)
    progress = _Progress(observers, path, save_every, identity)
    failure = None
    try:
        _run(prepared, dataloader, progress, (rank, world))
    except Exception as error:
        if world == 1:
            raise
        failure = error
    if world > 1:
        _raise_together(failure, rank, world)
        for observer in observers.values():
            reduce_observer(observer)
    return prepared


def _run(prepared: nn.Module, dataloader: Iterable[Any], progress: _Progress, share: tuple[int, int]) -> None:
    rank, world = share
    done = progress.load()
    total = len(dataloader) if hasattr(dataloader, "__len__") else None
    index, own = -1, 0
    with evaluating(prepared), torch.no_grad(), progress.saved_on_failure():
        for index, batch in enumerate(tqdm(dataloader, "calibrating", total, disable=rank > 0)):
            if index % world != rank:
                continue
            own += 1
            if own > done:
                _call(prepared, batch)
                progress.count_batch()
    if index < 0:
        raise ValueError("dataloader: expected at least one batch, got none")
    if own < done:
        raise ValueError(
            f"checkpoint: {progress.path} holds {done} batches, the dataloader has {own}; it belongs to other data"
        )
    progress.save()


def _call(model: nn.Module, item: Any) -> None:
    batch = Example.of_item(model, item, "batch")
    if batch.kwargs:
        _check_names(model, set(batch.kwargs))
    try:
        inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        forward = f"{type(model).__name__}.forward{inspect.signature(model.forward)}"
        raise ValueError(f"batch: {len(batch.args)} values do not fit {forward}: {error}") from error
    model(*batch.args, **batch.kwargs)


def _check_names(model: nn.Module, given: set[str]) -> None:
    """ValueError when the forward does not take the names `given`, or needs others."""
    accepted: set[str] = set()
    required = set()
    takes_any = False
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            # transformers annotates **kwargs with Unpack[SomeTypedDict], which has the names; else any name will do.
            typed = next(iter(getattr(parameter.annotation, "__args__", ())), None)
            takes_any = not hasattr(typed, "__total__")
            accepted |= set(getattr(typed, "__annotations__", ()))
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            accepted.add(name)
            if parameter.default is parameter.empty:
                required.add(name)
    wrong, missing = sorted(given - accepted) if not takes_any else [], sorted(required - given)
    if wrong or missing:
        problems = [f"unknown keys {wrong}"] * bool(wrong) + [f"missing keys {missing}"] * bool(missing)
        raise ValueError(f"batch: {', '.join(problems)}; {type(model).__name__}.forward takes {sorted(accepted)}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _raise_together(failure: Exception | None, rank: int, world: int) -> None:
    """Raise on every rank if any rank failed, so that no rank waits for it forever."""
    failed = torch.zeros(world, dtype=torch.int64)
    failed[rank] = failure is not None
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.any():
        raise RuntimeError(f"calibration failed on rank {', '.join(map(str, failed.nonzero().flatten().tolist()))}")


def _identity(model: nn.Module, observers: Mapping[str, nn.Module]) -> str:
    """Digest of the observers' settings and the model's parameters, which must match those of a checkpoint."""
    described = {name: describe_observer(observer) for name, observer in observers.items()}
    parameters = tensor_digest(model.named_parameters())
    return hashlib.sha256(json.dumps([described, parameters], sort_keys=True).encode()).hexdigest()


@dataclass
class _Progress:
    """The statistics of `observers` after `batches` batches, and their file `path`, if any."""

    observers: Mapping[str, nn.Module]
    path: Path | None
    save_every: int
    identity: str
    batches: int = 0
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _saved: int = 0

    def load(self) -> int:
        """Load the statistics from the file, if it exists; return the number of batches that they count."""
        if self.path is None:
            return 0
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: the directory of {self.path} does not exist; make it first")
        check_writable(self.path)
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        except SafetensorError as error:
            raise ValueError(f"checkpoint: {self.path} is not a calibration checkpoint: {error}") from error
        if metadata.get("identity") != self.identity:
            raise ValueError(
                f"checkpoint: {self.path} is of another model or configuration; delete it or give another path"
            )
        if not metadata.get("batches", "").isdecimal() or len(metadata["batches"]) > 18:
            raise ValueError(f"checkpoint: {self.path} is damaged: it does not say how many batches it counts")
        self._take(tensors)
        self._tensors = tensors
        self.batches = self._saved = int(metadata["batches"])
        return self.batches

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load the statistics `tensors` into the observers; ValueError if they do not fit."""
        left = dict(tensors)
        for name, observer in self.observers.items():
            own = {key: left.pop(f"{name}/{key}") for key in observer.state_dict() if f"{name}/{key}" in left}
            dtypes = {key: value.dtype for key, value in observer.state_dict().items()}
            try:
                if any(value.dtype != dtypes[key] for key, value in own.items()):
                    raise ValueError(f"expected {dtypes}")
                observer.load_state_dict(own)
            except (RuntimeError, ValueError) as error:  # load_state_dict raises RuntimeError
                raise ValueError(f"checkpoint: {self.path} is damaged: {name}: {shown(error)}") from error
        if left:
            raise ValueError(f"checkpoint: {self.path} is damaged: it has {shown(sorted(left))} beside the statistics")

    def count_batch(self) -> None:
        """Count a complete batch: keep a copy of the statistics, and save it after every `save_every` batches."""
        if self.path is None:
            return
        # A copy, since a batch that fails half way has already changed the observers.
        tensors = {
            f"{name}/{key}": value.clone(memory_format=torch.contiguous_format)
            for name, observer in self.observers.items()
            for key, value in observer.state_dict().items()
        }
        self._tensors, self.batches = tensors, self.batches + 1
        if self.batches % self.save_every == 0:
            self.save()

    def save(self) -> None:
        """Write the statistics of the complete batches to the file, unless it already holds them."""
        if self.path is None or self.batches == self._saved:
            return
        write_whole(self.path, save(self._tensors, {"identity": self.identity, "batches": str(self.batches)}))
        self._saved = self.batches

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # an interrupt as well
            self.save()
            raise
