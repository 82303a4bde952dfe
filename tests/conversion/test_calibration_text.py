"""Windows of tokens from files, datasets and the hub."""

import json
import sys
from io import StringIO
from pathlib import Path

import datasets
import pytest
import torch

from ipex_quant.conversion.calibration_text import text_documents
from ipex_quant.quantization import calibration_dataloader


def write(directory: Path, suffix: str, documents: list[str]) -> Path:
    path = directory / f"data{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(documents))
    elif suffix == ".parquet":
        datasets.Dataset.from_dict({"text": documents, "n": range(len(documents))}).to_parquet(path)
    else:
        rows = [json.dumps({"text": text, "n": i}) for i, text in enumerate(documents)]
        path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]")
    return path


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".parquet"])
def test_files(tokenizer, documents, tmp_path, suffix):
    path = write(tmp_path, suffix, documents)
    loaded = list(calibration_dataloader(path, tokenizer, samples=5, sequence_length=32, batch_size=2))
    assert [list(batch["input_ids"].shape) for batch in loaded] == [[2, 32], [2, 32], [1, 32]]
    for batch in loaded:
        assert batch.keys() == {"input_ids", "attention_mask"}
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].all()
    again = calibration_dataloader(str(path), tokenizer, samples=5, sequence_length=32, batch_size=2)
    listed = calibration_dataloader([path], tokenizer, samples=5, sequence_length=32, batch_size=2)
    for batch, same, third in zip(loaded, again, listed, strict=True):
        assert torch.equal(batch["input_ids"], same["input_ids"])
        assert torch.equal(batch["input_ids"], third["input_ids"])


def test_documents_in_memory_are_read_as_a_file_of_them(tokenizer, documents, tmp_path):
    path = write(tmp_path, ".jsonl", documents)
    sizes = {"samples": 6, "sequence_length": 32}
    expected = list(calibration_dataloader(path, tokenizer, **sizes, column="text"))
    found = list(calibration_dataloader(iter(documents), tokenizer, **sizes))
    assert [batch["input_ids"].tolist() for batch in found] == [batch["input_ids"].tolist() for batch in expected]
    again = list(calibration_dataloader((text for text in documents), tokenizer, **sizes))
    assert [batch["input_ids"].tolist() for batch in again] == [batch["input_ids"].tolist() for batch in found]
    with pytest.raises(TypeError, match="source: expected documents that are strings, got int"):
        calibration_dataloader(iter([1]), tokenizer)
    with pytest.raises(ValueError, match="source: the dataset is empty"):
        calibration_dataloader(iter([]), tokenizer)


def test_a_text_is_cut_into_documents_where_a_paragraph_ends():
    paragraph = "word " * 1000 + "\n"
    text = f"{paragraph}{paragraph}\n" * 10
    documents = list(text_documents(StringIO(text)))
    assert "".join(documents) == text
    assert len(documents) == 5
    assert all(document.endswith("\n\n") for document in documents)
    assert list(text_documents(StringIO(""))) == []
    assert len(list(text_documents(["x" * 200 + "\n"] * 2000))) == 4, "a text without paragraphs is cut too"


def test_windows_cut_the_joined_documents(tokenizer):
    """One after the other, the windows are the documents in some order, each closed by the end-of-sequence token."""
    texts = ["one two three", "four", "five six", "seven eight nine"]
    end = [tokenizer.eos_token_id]
    ids = {text: tokenizer(text)["input_ids"] + end for text in texts}
    total = sum(map(len, ids.values()))
    with pytest.warns(UserWarning, match=f"gives {total // 3} windows, fewer than samples=99"):
        loader = calibration_dataloader(datasets.Dataset.from_dict({"t": texts}), tokenizer, 99, 3, seed=3)
    found = torch.cat([batch["input_ids"].flatten() for batch in loader]).tolist()
    while ids:
        text = next((text for text, tokens in ids.items() if found[: len(tokens)] == tokens[: len(found)]), None)
        assert text is not None
        found = found[len(ids.pop(text)) :]


def test_seed_sets_the_order(tokenizer, documents):
    source = datasets.Dataset.from_dict({"text": documents})

    def first(seed, source=source):
        return next(iter(calibration_dataloader(source, tokenizer, 2, 64, seed=seed)))["input_ids"]

    assert torch.equal(first(1), first(1))
    assert torch.equal(first(1), first(1, source.to_iterable_dataset()))
    assert not torch.equal(first(1), first(2))


def test_reads_no_more_than_needed(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": "some words of a document"}

    source = datasets.IterableDataset.from_generator(endless)
    assert len(calibration_dataloader(source, tokenizer, samples=4, sequence_length=16)) == 4
    assert len(read) < 2000


def test_loading_leaves_the_random_state_alone(tokenizer, documents):
    state = torch.get_rng_state()
    list(calibration_dataloader(datasets.Dataset.from_dict({"text": documents}), tokenizer, 2, 16))
    assert torch.equal(torch.get_rng_state(), state)


def test_column(tokenizer, documents):
    two = datasets.Dataset.from_dict({"title": ["x"] * len(documents), "body": documents, "n": range(len(documents))})
    with pytest.raises(ValueError, match=r"got 'text'; the columns are \['title', 'body', 'n'\], those of strings"):
        calibration_dataloader(two, tokenizer)
    with pytest.raises(ValueError, match="column: expected one that holds strings, got 'n'"):
        calibration_dataloader(two, tokenizer, column="n")
    named = calibration_dataloader(two, tokenizer, 2, 32, column="body")
    only = calibration_dataloader(two.remove_columns("title"), tokenizer, 2, 32)
    text = calibration_dataloader(two.rename_column("body", "text"), tokenizer, 2, 32)
    for one, other, third in zip(named, only, text, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["input_ids"], third["input_ids"])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.jsonl", ValueError, "missing.jsonl does not exist"),
        (["short.txt", "missing.txt"], ValueError, "missing.txt does not exist"),
        (["short.txt", "bad.json"], ValueError, "expected files of one kind of .json, .jsonl, .parquet, .txt"),
        ("other.csv", ValueError, "expected files of one kind"),
        ("empty.txt", ValueError, "empty.txt is empty"),
        ("bad.json", ValueError, "cannot read .*bad.json"),
        ("short.txt", ValueError, "too little text for one window of 512 tokens, it has 4"),
        ([], ValueError, "expected files of one kind"),
        (3, TypeError, "expected a dataset, a name on the hub, paths or an iterator of documents, got int"),
    ],
    ids=str,
)
def test_bad_sources(tokenizer, tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    files = {"short.txt": "hello you", "empty.txt": "", "bad.json": '{"a": ', "other.csv": "a,b"}
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(error, match=message):
        calibration_dataloader(source, tokenizer)


def test_bad_datasets_and_numbers(tokenizer):
    empty = datasets.Dataset.from_dict({"text": []})
    for source in (empty, datasets.IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(ValueError, match="the dataset is empty"):
            calibration_dataloader(source, tokenizer)
    with pytest.raises(ValueError, match=r"expected one split, got a dict of the splits \['test'\]"):
        calibration_dataloader(datasets.DatasetDict(test=empty), tokenizer)
    for name in ("samples", "sequence_length", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive integer, got 0"):
            calibration_dataloader("x.txt", tokenizer, **{name: 0})


def test_hub(tokenizer, documents, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args == ("user/none",):
            raise ConnectionError("no route")
        return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(calibration_dataloader("user/name", tokenizer, 2, 32)) == 2
    assert calls == [(("user/name",), {"split": "train", "streaming": True})]
    with pytest.raises(RuntimeError, match=r"'user/none' is no local file, and the hub does not give .*: no route"):
        calibration_dataloader("user/none", tokenizer)


def test_without_datasets(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        calibration_dataloader("x.txt", tokenizer)
