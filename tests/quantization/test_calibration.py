import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BatchEncoding, LlamaConfig, LlamaForCausalLM

from ipex_quant.data import embedded_model_dir, held_out_text
from ipex_quant.observers import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from ipex_quant.quantization._calibration import calibrate, calibration_dataloader

datasets = pytest.importorskip("datasets")

WORKER = Path(__file__).with_name("calibration_worker.py")
_spec = importlib.util.spec_from_file_location("calibration_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
Model, batches, statistics = worker.Model, worker.batches, worker.statistics


@pytest.fixture(autouse=True)
def _observed_models():
    with worker.observed_models():
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture(scope="module")
def documents():
    return [text for text in held_out_text().split("\n\n")[:400] if text.strip()]


def run_worker(mode: str, directory: Path, rank: int = 0, world: int = 1) -> subprocess.Popen:
    arguments = [sys.executable, str(WORKER), mode, str(directory), str(rank), str(world)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def assert_equal_statistics(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# The data


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
        (3, TypeError, "expected a dataset, a name on the hub or paths, got int"),
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


# The loop


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, torch.tensor(1.0)],
        lambda x: {"x": x},
        lambda x: BatchEncoding({"x": x, "scale": 1.0}),
    ],
)
def test_kinds_of_batches(wrap):
    model, expected = Model(), Model()
    model.first.eval()
    assert calibrate(model, map(wrap, batches(3))) is model
    for x in batches(3):
        expected(x)
    assert_equal_statistics(statistics(model), statistics(expected))
    assert model.modes == {False}  # neither training nor recording gradients
    assert model.training
    assert not model.first.training


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": 1}, r"unknown keys \['y'\], missing keys \['x'\]; Model.forward takes \['scale', 'x'\]"),
        ({"scale": 1.0}, r"missing keys \['x'\]"),
        ((1, 2, 3), "3 values do not fit Model.forward"),
        ((), "0 values do not fit"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        calibrate(model, [batch])
    assert model.calls == 0
    assert model.training


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="expected a mapping, a tuple, a list or a tensor, got str"):
        calibrate(Model(), ["text"])
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        calibrate(Model(), [])
    with pytest.raises(ValueError, match="save_every: expected a positive integer, got 0"):
        calibrate(Model(), batches(1), save_every=0)


def test_keys_of_a_transformers_model():
    """Its forward takes any keyword, but says which ones it knows."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9))
    model.observers = {"head": MinMaxObserver()}
    ids = torch.tensor([[1, 2, 3]])
    calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}])
    with pytest.raises(ValueError, match=r"unknown keys \['text'\]; LlamaForCausalLM.forward takes .*'input_ids'"):
        calibrate(model, [{"input_ids": ids, "text": "x"}])


class AnyKeywords(nn.Module):
    observers: dict = {}  # noqa: RUF012

    def forward(self, **inputs):
        return inputs["whatever"]


def test_forward_that_takes_any_keyword():
    calibrate(AnyKeywords(), [{"whatever": 1}])


# Interruptions


def undisturbed(count: int, **kwargs) -> dict[str, torch.Tensor]:
    return statistics(calibrate(Model(**kwargs), batches(count)))


def test_resumes_after_kill(tmp_path):
    process = run_worker("kill", tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    model = calibrate(Model(), batches(16), tmp_path / "checkpoint", save_every=4)
    assert model.calls == 16 - 8  # the last multiple of four before the end
    assert_equal_statistics(statistics(model), undisturbed(16))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_resumes_after_an_error_amid_a_batch(tmp_path, error):
    """The first observer has seen the batch that failed; the file must not count it."""

    def fail(module, args):
        if model.calls == 6:
            raise error

    model = Model()
    model.second.register_forward_pre_hook(fail)
    with pytest.raises(error):
        calibrate(model, batches(8), tmp_path / "checkpoint", save_every=100)
    resumed = calibrate(Model(), batches(8), tmp_path / "checkpoint")
    assert resumed.calls == 8 - 5
    assert_equal_statistics(statistics(resumed), undisturbed(8))


def test_finished_calibration_is_not_repeated(tmp_path):
    calibrate(Model(), batches(5), tmp_path / "checkpoint")
    model = calibrate(Model(), batches(5), str(tmp_path / "checkpoint"))
    assert model.calls == 0
    assert_equal_statistics(statistics(model), undisturbed(5))


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "checkpoint"
    calibrate(Model(), batches(5), path)
    for other in (Model(width=7), Model(MinMaxObserver), Model(HistogramObserver.with_args(bins=16))):
        with pytest.raises(ValueError, match="checkpoint is of another model or configuration"):
            calibrate(other, batches(5), path)
        assert not any(observer.has_data for observer in other.observers.values())
    with pytest.raises(ValueError, match="holds 5 batches, the dataloader has 4"):
        calibrate(Model(), batches(4), path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a calibration checkpoint"):
        calibrate(Model(), batches(5), path)
    with pytest.raises(ValueError, match=r"the directory of .* does not exist"):
        calibrate(Model(), batches(5), tmp_path / "missing" / "checkpoint")


# Several processes


def test_two_ranks_hold_what_one_process_does(tmp_path):
    ranks = [run_worker("ranks", tmp_path, rank, 2) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    expected = {}
    for name, factory in worker.FACTORIES.items():
        expected |= {f"{name} {key}": value for key, value in undisturbed(7, factory=factory).items()}
    expected |= {f"alone {key}": value for key, value in undisturbed(1).items()}
    for rank in range(2):
        assert_equal_statistics(load_file(tmp_path / str(rank)), expected)
    assert outputs[0].strip() == "RuntimeError: calibration failed on rank 1"
    assert outputs[1].strip() == "ValueError: expected finite values, got NaN or Inf"


def test_moving_averages_are_refused_over_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = Model(MovingAverageMinMaxObserver)
    with pytest.raises(TypeError, match="moving average depends on the order"):
        calibrate(model, batches(3))
    assert model.calls == 0


# With real prepared models


def prepared_embedded_model():
    from transformers import AutoModelForCausalLM

    from ipex_quant.quantization import get_smooth_quant_qconfig_mapping, prepare

    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
    example = {"input_ids": torch.ones(1, 8, dtype=torch.int64), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    return prepare(model, get_smooth_quant_qconfig_mapping(alpha=0.5), example_kwarg_inputs=example)


def test_prepared_model(tokenizer, documents, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real observers
    loader = calibration_dataloader(datasets.Dataset.from_dict({"text": documents}), tokenizer, 4, 32)
    from ipex_quant.quantization import _observed

    monkeypatch.setattr("ipex_quant.quantization._calibration.observed", _observed.observed)
    models = [prepared_embedded_model() for _ in range(3)]
    observers = [_observed.observed(model).observers() for model in models]
    assert not any(observer.has_data for observer in observers[0].values())
    calibrate(models[0], loader)
    calibrate(models[1], list(loader)[:3], tmp_path / "checkpoint")
    calibrate(models[2], loader, tmp_path / "checkpoint")
    assert observers[0]
    for name, observer in observers[0].items():
        assert observer.has_data
        assert torch.equal(observer.min_val, observers[2][name].min_val)
        assert torch.equal(observer.max_val, observers[2][name].max_val)
    with pytest.raises(RuntimeError, match="not prepared"):
        calibrate(nn.Linear(2, 2), loader)
