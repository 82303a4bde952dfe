"""`calibration_dataloader` and `calibrate`: run data through a prepared model, resumable and over several processes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..observers import check_reducible, describe_observer, reduce_observer
from ._observed import observed

if TYPE_CHECKING:
    import datasets

    Source = datasets.Dataset | datasets.IterableDataset | str | Path | Sequence[str | Path]

SHUFFLE_BUFFER = 1000
"""Documents among which the next one is drawn."""

TEXT_DOCUMENT_BYTES = 1 << 14
"""A text file is cut into documents at the first blank line after so many bytes, or any line after eight times that."""

_EMPTY = "source: the dataset is empty"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def calibration_dataloader(
    source: Source,
    tokenizer: Any,
    samples: int = 128,
    sequence_length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    column: str | None = None,
) -> DataLoader:
    """Batches ``{"input_ids", "attention_mask"}``, int64 ``[batch_size, sequence_length]``, of `samples` windows.

    `source` is a `datasets.Dataset` or `IterableDataset`, the name of one on the hub (its split "train" is streamed) or
    one or more local files: .txt, .json, .jsonl or .parquet. `column` holds the text; None is the only column of
    strings, or else "text". Documents come in an order that `seed` sets, are joined by the tokenizer's end-of-sequence
    token and cut into windows; no more is read than that takes. Raises ValueError for a source that is missing, empty
    or too short for one window, RuntimeError when the hub does not deliver, ImportError without `datasets`; warns when
    there are fewer windows than `samples`.
    """
    for name, value in (("samples", samples), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    windows: list[dict[str, torch.Tensor]] = []
    tokens = 0
    for ids in _windows(_documents(source, column, seed), tokenizer, sequence_length):
        tokens += len(ids)
        if len(ids) == sequence_length:
            windows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if len(windows) == samples:
            break
    if not windows:
        raise ValueError(
            f"source: too little text for one window of {sequence_length} tokens, it has {tokens}; give more text or a "
            "smaller sequence_length"
        )
    if len(windows) < samples:
        warnings.warn(f"source: the text gives {len(windows)} windows, fewer than samples={samples}", stacklevel=2)
    # A generator of its own, since iterating draws from the global one otherwise.
    return DataLoader(windows, batch_size=batch_size, generator=torch.Generator().manual_seed(seed))


def calibrate(
    prepared: nn.Module, dataloader: Iterable[Any], checkpoint: str | Path | None = None, save_every: int = 16
) -> nn.Module:
    """Run every batch of `dataloader` through `prepared`, without gradients and in eval mode, and return it.

    A batch is a mapping of the forward's arguments, a tuple or list of them, or one tensor. With `checkpoint`, a file,
    the statistics are saved there, atomically, after every `save_every` batches, at the end and when a batch fails; if
    the file exists, calibration goes on after the batches it counts, to the same bits. When torch.distributed is
    initialised, rank r runs the batches r, r + world size, ... of the same dataloader, each rank has a file of its own,
    and in the end all hold the statistics of all batches. Raises ValueError for batches that the forward does not take,
    no batches at all, or the checkpoint of another model, and RuntimeError when `prepared` is not or a rank failed.
    """
    observers = observed(prepared).observers()
    if not isinstance(save_every, int) or save_every < 1:
        raise ValueError(f"save_every: expected a positive integer, got {save_every!r}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    for observer in observers.values() if world > 1 else ():
        check_reducible(observer)
        if rank > 0 and hasattr(observer, "reset"):  # what all ranks hold already is to count once
            observer.reset()
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and world > 1:
        path = path.with_name(f"{path.name}.rank{rank}-of-{world}")
    statistics = _Statistics(observers, path, save_every, _identity(prepared, observers))
    failure = None
    try:
        _run(prepared, dataloader, statistics, (rank, world))
    except Exception as error:
        if world == 1:
            raise
        failure = error
    if world > 1:
        _raise_together(failure, rank, world)
        for observer in observers.values():
            reduce_observer(observer)
    return prepared


def _run(prepared: nn.Module, dataloader: Iterable[Any], statistics: _Statistics, share: tuple[int, int]) -> None:
    rank, world = share
    done = statistics.load()
    total = len(dataloader) if hasattr(dataloader, "__len__") else None
    index, own = -1, 0
    with _evaluating(prepared), torch.no_grad(), statistics.saved_on_failure():
        for index, batch in enumerate(tqdm(dataloader, "calibrating", total, disable=rank > 0)):
            if index % world != rank:
                continue
            own += 1
            if own > done:
                _call(prepared, batch)
                statistics.count_batch()
    if index < 0:
        raise ValueError("dataloader: expected at least one batch, got none")
    if own < done:
        raise ValueError(
            f"checkpoint: {statistics.path} holds {done} batches, the dataloader has {own}; it belongs to other data"
        )
    statistics.save()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        _check_names(model, set(batch))
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        try:
            inspect.signature(model.forward).bind(*batch)
        except TypeError as error:
            forward = f"{type(model).__name__}.forward{inspect.signature(model.forward)}"
            raise ValueError(f"batch: {len(batch)} values do not fit {forward}: {error}") from error
        model(*batch)
    elif isinstance(batch, torch.Tensor):
        model(batch)
    else:
        raise TypeError(f"batch: expected a mapping, a tuple, a list or a tensor, got {type(batch).__name__}")


def _check_names(model: nn.Module, given: set[str]) -> None:
    """ValueError when the forward does not take the names `given`, or needs others."""
    accepted: set[str] = set()
    required = set()
    takes_any = False
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            # Unpack[SomeTypedDict], as transformers writes it, tells the names; otherwise all are welcome.
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _raise_together(failure: Exception | None, rank: int, world: int) -> None:
    """Raise on every rank when one failed, so that none waits for it."""
    failed = torch.zeros(world, dtype=torch.int64)
    failed[rank] = failure is not None
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.any():
        raise RuntimeError(f"calibration failed on rank {', '.join(map(str, failed.nonzero().flatten().tolist()))}")


def _identity(model: nn.Module, observers: Mapping[str, nn.Module]) -> str:
    """Digest of what a checkpoint must agree with: the observers, and names and shapes of the parameters."""
    described = {name: describe_observer(observer) for name, observer in observers.items()}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return hashlib.sha256(json.dumps([described, shapes], sort_keys=True).encode()).hexdigest()


@dataclass
class _Statistics:
    """The statistics of `observers` after `batches` batches, and their file `path`, if any."""

    observers: Mapping[str, nn.Module]
    path: Path | None
    save_every: int
    identity: str
    batches: int = 0
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _saved: int = 0

    def load(self) -> int:
        """Take the statistics from the file, where there is one; the number of batches that they count."""
        if self.path is None:
            return 0
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: the directory of {self.path} does not exist; make it first")
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
        for name, observer in self.observers.items():
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            observer.load_state_dict(own)
        self._tensors = tensors
        self.batches = self._saved = int(metadata["batches"])
        return self.batches

    def count_batch(self) -> None:
        """A batch is complete: remember its statistics, and save them when it is time."""
        if self.path is None:
            return
        # A copy, since a batch that fails half way leaves its traces in the observers.
        tensors = {
            f"{name}/{key}": value.clone(memory_format=torch.contiguous_format)
            for name, observer in self.observers.items()
            for key, value in observer.state_dict().items()
        }
        self._tensors, self.batches = tensors, self.batches + 1
        if self.batches % self.save_every == 0:
            self.save()

    def save(self) -> None:
        """Replace the file by the statistics of the complete batches, unless it holds them."""
        if self.path is None or self.batches == self._saved:
            return
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(save(self._tensors, {"identity": self.identity, "batches": str(self.batches)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._saved = self.batches

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # an interrupt as well
            self.save()
            raise


def _documents(source: Source, column: str | None, seed: int) -> Iterator[str]:
    """The texts of `source`, streamed, in an order that `seed` sets."""
    rows = _open(source)
    try:
        first = next(iter(rows), None)
    except Exception as error:  # datasets has one for every format
        raise ValueError(f"source: cannot read {source}: {error}") from error
    if first is None:
        raise ValueError(_EMPTY)
    column = _text_column(first, column)
    for row in rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
        if row[column]:
            yield row[column]


def _open(source: Source) -> datasets.IterableDataset:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("calibration data are read with the package datasets; run `pip install datasets`") from error
    if isinstance(source, datasets.IterableDataset):
        return source
    if isinstance(source, datasets.Dataset) and len(source) > 0:
        return source.to_iterable_dataset()
    if isinstance(source, datasets.Dataset):
        raise ValueError(_EMPTY)
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(f"source: expected one split, got a dict of the splits {sorted(source)}")
    if not isinstance(source, (str, Path, list, tuple)):
        raise TypeError(f"source: expected a dataset, a name on the hub or paths, got {type(source).__name__}")
    is_name = isinstance(source, str) and Path(source).suffix not in _BUILDERS and not Path(source).exists()
    if not is_name:
        return _open_files([Path(path) for path in ([source] if isinstance(source, (str, Path)) else source)])
    try:
        return datasets.load_dataset(source, split="train", streaming=True)
    except Exception as error:  # of the network, the hub and the dataset
        raise RuntimeError(
            f"source: {source!r} is no local file, and the hub does not give its split 'train': {error}; check name "
            "and network, or load it with the package datasets and give the dataset"
        ) from error


def _open_files(paths: list[Path]) -> datasets.IterableDataset:
    import datasets

    suffixes = {path.suffix for path in paths}
    if len(suffixes) != 1 or not suffixes <= _BUILDERS.keys():
        raise ValueError(f"source: expected files of one kind of {', '.join(_BUILDERS)}, got {[*map(str, paths)]}")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"source: {path} does not exist or is no file")
        if path.stat().st_size == 0:
            raise ValueError(f"source: {path} is empty")
    files = [str(path) for path in paths]
    builder = _BUILDERS[suffixes.pop()]
    if builder == "text":
        return datasets.IterableDataset.from_generator(_text_documents, gen_kwargs={"files": files})
    return datasets.load_dataset(builder, data_files=files, split="train", streaming=True)


def _text_documents(files: list[str]) -> Iterator[dict[str, str]]:
    """Documents of text files, cut where a paragraph ends, so that the joining token does not come too often."""
    for name in files:
        with open(name, encoding="utf-8") as file:
            lines: list[str] = []
            size = 0
            for line in file:
                lines.append(line)
                size += len(line)
                if (size >= TEXT_DOCUMENT_BYTES and not line.strip()) or size >= 8 * TEXT_DOCUMENT_BYTES:
                    yield {"text": "".join(lines)}
                    lines, size = [], 0
            if lines:
                yield {"text": "".join(lines)}


def _text_column(row: Mapping[str, Any], column: str | None) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if column is None:
        column = strings[0] if len(strings) == 1 else "text"
    if column not in strings:
        raise ValueError(
            f"column: expected one that holds strings, got {column!r}; the columns are {list(row)}, those of strings "
            f"{strings}"
        )
    return column


def _windows(documents: Iterable[str], tokenizer: Any, sequence_length: int) -> Iterator[torch.Tensor]:
    """Token ids of the joined documents in pieces of `sequence_length`; the last one may be shorter."""
    end = getattr(tokenizer, "eos_token_id", None)
    rest: list[int] = []
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        rest += ids if end is None or ids[-1:] == [end] else [*ids, end]
        while len(rest) >= sequence_length:
            yield torch.tensor(rest[:sequence_length])
            rest = rest[sequence_length:]
    if rest:
        yield torch.tensor(rest)
