import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from ipex_quant.data import embedded_model_dir
from ipex_quant.observers import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from ipex_quant.quantization import calibrate, calibration_dataloader

WORKER = Path(__file__).with_name("calibration_worker.py")
_spec = importlib.util.spec_from_file_location("calibration_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
Model, batches, statistics = worker.Model, worker.batches, worker.statistics


@pytest.fixture(autouse=True)
def _observed_models():
    with worker.observed_models():
        yield


def run_worker(mode: str, directory: Path, rank: int = 0, world: int = 1) -> subprocess.Popen:
    arguments = [sys.executable, str(WORKER), mode, str(directory), str(rank), str(world)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def assert_equal_statistics(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


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
    ],
)
def test_batches_that_do_not_fit(batch, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        calibrate(model, [batch])
    assert model.calls == 0
    assert model.training


def test_other_bad_arguments():
    with pytest.raises(TypeError, match=r"batch: expected items that are a mapping, .*, got str"):
        calibrate(Model(), ["text"])
    with pytest.raises(TypeError, match=r"batch: expected items that are a mapping, .*, got an empty tuple"):
        calibrate(Model(), [()])
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
    tuned = Model()
    with torch.no_grad():
        next(tuned.parameters()).view(-1)[-1] += 1
    with pytest.raises(ValueError, match="checkpoint is of another model or configuration"):
        calibrate(tuned, batches(5), path)
    with pytest.raises(ValueError, match="holds 5 batches, the dataloader has 4"):
        calibrate(Model(), batches(4), path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a calibration checkpoint"):
        calibrate(Model(), batches(5), path)
    with pytest.raises(ValueError, match=r"the directory of .* does not exist"):
        calibrate(Model(), batches(5), tmp_path / "missing" / "checkpoint")


def _renamed(tensors, name):
    tensors["x"] = tensors.pop(name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, name: tensors.pop(name),
        lambda tensors, name: tensors.update(x=torch.ones(1)),
        lambda tensors, name: tensors.update({name: tensors[name].double()}),
        lambda tensors, name: tensors.update({name: torch.ones(3, 3)}),
        _renamed,
    ],
)
def test_damaged_checkpoints(tmp_path, damage):
    path = tmp_path / "checkpoint"
    calibrate(Model(), batches(5), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damage(tensors, min(tensors))
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="checkpoint is damaged"):
        calibrate(Model(), batches(5), path)


@pytest.mark.parametrize("count", ["", "-1", "x", "9" * 5000])
def test_damaged_counts(tmp_path, count):
    path = tmp_path / "checkpoint"
    calibrate(Model(), batches(5), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"batches": count})
    with pytest.raises(ValueError, match="does not say how many batches"):
        calibrate(Model(), batches(5), path)


def test_a_checkpoint_that_cannot_be_written_is_told_before_the_work(tmp_path):
    model = Model()
    with pytest.raises(IsADirectoryError):
        calibrate(model, batches(5), tmp_path)
    assert model.calls == 0


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
    last = [output.splitlines()[-1] for output in outputs]  # Gloo of torch 2.10 prints a greeting before
    assert last == ["RuntimeError: calibration failed on rank 1", "ValueError: expected finite values, got NaN or Inf"]


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
    from ipex_quant.conversion import observed as _observed

    monkeypatch.setattr("ipex_quant.conversion.calibration.observed", _observed.observed)
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
