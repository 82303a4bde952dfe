"""`calibration_dataloader`: windows of tokens from datasets and files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    import datasets

    Source: TypeAlias = (
        datasets.Dataset
        | datasets.IterableDataset
        | str
        | Path
        | Sequence[str | Path]
        | Iterator[str]
        | Mapping[str | Path, float]
    )

SHUFFLE_BUFFER = 1000
"""Number of documents in the buffer from which the next one is drawn at random."""

TEXT_DOCUMENT_BYTES = 1 << 14
"""Least size of a document: a text is cut at the next blank line after it, or at any line after eight times it."""


class Document(NamedTuple):
    """A text to calibrate on; `complete` if it has the special tokens that it should begin with."""

    text: str
    complete: bool = False


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
    """A dataloader of `samples` windows of tokens from a dataset, files or documents.

    Its batches are ``{"input_ids", "attention_mask"}``, int64 ``[batch_size, sequence_length]``.

    - `source` is a `datasets.Dataset` or `IterableDataset`, the name of one on the hub (its split "train" is streamed),
      one or more local files (.txt, .json, .jsonl or .parquet), or an iterator of documents, which is read whole.
      A mapping mixes datasets and files, by name or path, as many windows of each as its weight says.
    - `column` is the column with the text, or with conversations, lists of messages with "role" and "content" that the
      tokenizer's chat template makes text of; None is "messages" if there is such a one, the only column of strings, or
      else "text".
    - `seed` sets the order of the documents, which are joined by the tokenizer's end-of-sequence token and then cut
      into windows. Datasets and files are read only as far as needed.

    Raises ValueError for a source that is missing, empty or too short for one window, weights that are not above 0, and
    conversations that the tokenizer has no template for, RuntimeError if the hub does not deliver, and ImportError
    without `datasets`. Warns if there are fewer windows than `samples`.
    """
    for name, value in (("samples", samples), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    parts = {None: (source, samples)}
    if isinstance(source, Mapping) and not hasattr(source, "column_names"):  # which dicts of splits have
        parts = {str(name): (name, count) for name, count in _shares(source, samples).items() if count}
    found = []
    for name, (part, count) in parts.items():
        where = "source" if name is None else f"source {name}"
        windows = _read_windows(where, _documents(part, tokenizer, column, seed), tokenizer, count, sequence_length)
        if len(windows) < count:
            what = f"samples={count}" if name is None else f"its share of {count}"
            warnings.warn(f"{where}: the text gives {len(windows)} windows, fewer than {what}", stacklevel=2)
        found += windows
    if len(parts) > 1:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
        found = [found[i] for i in order]
    windows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in found]
    # Without a generator of its own, iterating would draw from the global one.
    return DataLoader(windows, batch_size=batch_size, generator=torch.Generator().manual_seed(seed))


def _read_windows(
    where: str, documents: Iterable[Document], tokenizer: Any, count: int, sequence_length: int
) -> list[torch.Tensor]:
    """The first `count` windows, or all; ValueError if there is none."""
    windows: list[torch.Tensor] = []
    tokens = 0
    for ids in _windows(documents, tokenizer, sequence_length):
        tokens += len(ids)
        if len(ids) == sequence_length:
            windows.append(ids)
        if len(windows) == count:
            break
    if not windows:
        raise ValueError(
            f"{where}: too little text for one window of {sequence_length} tokens, it has {tokens}; give more text or "
            "a smaller sequence_length"
        )
    return windows


def _shares(weights: Mapping[Any, float], samples: int) -> dict[Any, int]:
    """`samples` divided by `weights`, with the largest remainders rounded up; ValueError for a weight not above 0."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"source {name}: expected a weight above 0, got {weight!r}")
    if not weights:
        raise ValueError("source: expected at least one dataset or file, got an empty mapping")
    exact = {name: samples * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(each) for name, each in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: samples - sum(shares.values())]:
        shares[name] += 1
    return shares


def _documents(source: Source, tokenizer: Any, column: str | None, seed: int) -> Iterator[Document]:
    """Yield the texts of `source`, shuffled by `seed`."""
    rows = _open(source)
    try:
        first = next(iter(rows), None)
    except Exception as error:  # datasets has one for every format
        raise ValueError(f"source: cannot read {source}: {error}") from error
    if first is None:
        raise ValueError(_EMPTY)
    column = _text_column(first, column)
    is_chat = not isinstance(first[column], str)
    for row in rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
        if row[column]:
            yield Document(_templated(tokenizer, row[column]), True) if is_chat else Document(row[column])


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
    if isinstance(source, Iterator):
        return datasets.IterableDataset.from_generator(partial(_rows, _checked_documents(source)))
    if not isinstance(source, (str, Path, list, tuple)):
        raise TypeError(
            f"source: expected a dataset, a name on the hub, paths or an iterator of documents, got "
            f"{type(source).__name__}"
        )
    is_name = isinstance(source, str) and Path(source).suffix not in _BUILDERS and not Path(source).exists()
    if not is_name:
        return _open_files([Path(path) for path in ([source] if isinstance(source, (str, Path)) else source)])
    try:
        return datasets.load_dataset(source, split="train", streaming=True)
    except Exception as error:  # from the network, the hub or the dataset
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
        return datasets.IterableDataset.from_generator(_rows_of_files, gen_kwargs={"files": files})
    try:
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    except Exception as error:  # datasets has one for every format
        raise ValueError(f"source: cannot read {', '.join(files)}: {error}") from error


def _rows_of_files(files: list[str]) -> Iterator[dict[str, str]]:
    for name in files:
        with open(name, encoding="utf-8") as file:
            yield from _rows(text_documents(file))


def _rows(documents: Iterable[str]) -> Iterator[dict[str, str]]:
    return ({"text": document} for document in documents)


def _checked_documents(documents: Iterator[str]) -> tuple[str, ...]:
    """All `documents`; TypeError for one that is no string."""
    read = tuple(documents)
    for document in read:
        if not isinstance(document, str):
            raise TypeError(f"source: expected documents that are strings, got {type(document).__name__}")
    return read


def text_documents(lines: Iterable[str]) -> Iterator[str]:
    """Cut the text in `lines` into documents at ends of paragraphs; long ones keep end-of-sequence tokens rare."""
    kept: list[str] = []
    size = 0
    for line in lines:
        kept.append(line)
        size += len(line)
        if (size >= TEXT_DOCUMENT_BYTES and not line.strip()) or size >= 8 * TEXT_DOCUMENT_BYTES:
            yield "".join(kept)
            kept, size = [], 0
    if kept:
        yield "".join(kept)


def _text_column(row: Mapping[str, Any], column: str | None) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    chats = [name for name, value in row.items() if _is_conversation(value)]
    if column is None and "messages" in chats:
        column = "messages"
    if column in chats:
        return column
    if column is None:
        column = strings[0] if len(strings) == 1 else "text"
    if column not in strings:
        raise ValueError(
            f"column: expected one that holds strings, got {column!r}; the columns are {list(row)}, those of strings "
            f"{strings}"
        )
    return column


def _is_conversation(value: Any) -> bool:
    messages = isinstance(value, list) and bool(value)
    return messages and all(isinstance(each, Mapping) and "role" in each for each in value)


def _templated(tokenizer: Any, messages: list[Mapping[str, Any]]) -> str:
    """The text that the chat template of `tokenizer` makes of `messages`; ValueError without a template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "source: it has conversations, and the tokenizer no chat template; give text, or another column"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs, which raise what they like
        raise ValueError(f"source: the tokenizer's chat template does not take a conversation: {error}") from error


def _windows(documents: Iterable[Document], tokenizer: Any, sequence_length: int) -> Iterator[torch.Tensor]:
    """Token ids of the joined documents in pieces of `sequence_length`; the last one may be shorter."""
    end = getattr(tokenizer, "eos_token_id", None)
    rest: list[int] = []
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=not document.complete, verbose=False)["input_ids"]
        rest += ids if end is None or ids[-1:] == [end] else [*ids, end]
        while len(rest) >= sequence_length:
            yield torch.tensor(rest[:sequence_length])
            rest = rest[sequence_length:]
    if rest:
        yield torch.tensor(rest)
