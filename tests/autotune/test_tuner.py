import dataclasses
import inspect
import json
import time

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.autotune import Report, TuningOptions, autotune, tune
from ipex_quant.autotune.trials import read_record
from ipex_quant.nn import Int8Linear
from ipex_quant.nn.linears import is_linear
from ipex_quant.quantization import convert, get_smooth_quant_qconfig_mapping

from .conftest import PLANTED, SAMPLES


def float_linears(model):
    return [name for name, module in model.named_modules() if is_linear(module)]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


@pytest.fixture
def tiny_batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator) for _ in range(4)]


def test_outliers_are_tuned_within_one_percent(make_model, batches, eval_func, tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = autotune(model, batches, eval_func=eval_func, sampling_sizes=[SAMPLES], record=tmp_path / "trials.jsonl")
    assert eval_func.calls < 12
    head, sensitivity, trials = read_record(tmp_path / "trials.jsonl")
    assert trials[head["best"]].met
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or hasattr(module, "qconfig") for module in model.modules())
    assert sensitivity.keys() == set(float_linears(model))

    converted = convert(prepared)
    assert not float_linears(converted)
    assert eval_func(converted) == trials[head["best"]].metric, "the result is what was measured, to the bit"
    assert eval_func(converted) > head["baseline"] * 1.01

    prepared.save_qconf_summary(qconf_summary=tmp_path / "summary.json")
    deployed = ipex.llm.optimize(
        model,
        quantization_config=get_smooth_quant_qconfig_mapping(),
        qconfig_summary_file=tmp_path / "summary.json",
    )
    assert eval_func(deployed) == pytest.approx(trials[head["best"]].metric, rel=3e-3)


def test_only_the_layer_that_cannot_be_int8_stays_in_float(make_model, plant, batches, eval_func):
    model = plant(make_model())
    prepared = ipex.quantization.autotune(model, batches, eval_func=eval_func, sampling_sizes=[SAMPLES])
    assert eval_func.calls < 12
    converted = convert(prepared)
    assert float_linears(converted) == [PLANTED]
    assert sum(isinstance(module, Int8Linear) for module in converted.modules()) == len(float_linears(model)) - 1


def test_an_impossible_criterion_gives_the_best_and_names_the_gap(tiny, tiny_batches, tmp_path):
    options = {"accuracy_criterion": {"relative": -0.5}, "record": tmp_path / "trials.jsonl"}
    with pytest.warns(UserWarning, match=r"no candidate of \d+ meets the criterion.*-0.5 relative.*0\.50?\d* too much"):
        prepared = autotune(tiny, tiny_batches, **options)
    head, _, trials = read_record(tmp_path / "trials.jsonl")
    best = trials[head["best"]]
    assert best.loss == min(trial.loss for trial in trials)
    assert len(float_linears(convert(prepared))) == len(best.recipe["float_modules"]) == 2, "all but one were tried"


def test_without_eval_func_outputs_are_compared_with_the_float_models(tiny, tiny_batches, tmp_path):
    prepared = autotune(tiny, tiny_batches, record=tmp_path / "trials.jsonl")
    head, _, trials = read_record(tmp_path / "trials.jsonl")
    assert head["baseline"] == 1
    converted = convert(prepared)
    x = torch.cat(tiny_batches)
    error = (converted(x) - tiny(x)).square().sum() / tiny(x).square().sum()
    assert trials[head["best"]].metric == pytest.approx(1 - error.item(), abs=1e-6)
    assert trials[head["best"]].measured_ms is None


def test_tune_also_returns_its_report(tiny, tiny_batches, tmp_path):
    options = TuningOptions(smoothquant_args={"alpha": 0.5}, record=tmp_path / "trials.jsonl")
    prepared, report = tune(tiny, tiny_batches, options)
    assert report == Report.of(tmp_path / "trials.jsonl")
    assert report.met
    expected = autotune(tiny, tiny_batches, smoothquant_args={"alpha": 0.5})
    assert torch.equal(convert(prepared)(tiny_batches[0]), convert(expected)(tiny_batches[0]))
    assert tune(tiny, tiny_batches)[1].criterion == "0.01 relative"


def test_options_are_those_of_autotune_with_its_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(TuningOptions)}
    parameters = {name: p.default for name, p in inspect.signature(autotune).parameters.items()}
    assert fields == {name: p for name, p in parameters.items() if name not in ("model", "calib_dataloader")}


def test_inplace(tiny, tiny_batches):
    assert autotune(tiny, tiny_batches, inplace=True) is tiny
    assert all(isinstance(convert(tiny)[i], Int8Linear) for i in (0, 2, 4))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "with label", "with last_ind", "generator"])
def test_forms_of_batches(tiny, tiny_batches, form):
    forms = {
        "tensor": lambda x: x,
        "tuple": lambda x: (x,),
        "list": lambda x: [x],
        "dict": lambda x: {"input": x},
        "with label": lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        "with last_ind": lambda x: ((x,), torch.tensor([3])),
        "generator": lambda x: x,
    }
    dataloader = [forms[form](x) for x in tiny_batches]
    prepared = autotune(tiny, iter(dataloader) if form == "generator" else dataloader)
    expected = autotune(tiny, tiny_batches)
    x = tiny_batches[0]
    assert torch.equal(convert(prepared)(x), convert(expected)(x))


def test_calib_func_takes_the_place_of_the_dataloaders_data(tiny, tiny_batches):
    def calibrate(model):
        for x in tiny_batches:
            model(x * 2)

    prepared = autotune(tiny, tiny_batches, calibrate, smoothquant_args={"alpha": 0.5})
    expected = autotune(tiny, [x * 2 for x in tiny_batches], smoothquant_args={"alpha": 0.5})
    x = tiny_batches[0]
    assert torch.equal(convert(prepared)(x), convert(expected)(x))


def test_sampling_sizes_are_recipes(tiny, tiny_batches, tmp_path):
    autotune(
        tiny,
        tiny_batches,
        smoothquant_args={"alpha": [0.4, 0.6]},
        sampling_sizes=[8, 16, 100],
        tuning_time=1000,
        record=tmp_path / "trials.jsonl",
    )
    _, _, trials = read_record(tmp_path / "trials.jsonl")
    tried = {(trial.recipe["alpha"], trial.recipe["samples"]) for trial in trials}
    assert tried == {(alpha, samples) for alpha in (0.4, 0.6) for samples in (8, 16, 100)}


def test_tuning_time(tiny, tiny_batches, tmp_path):
    def slow(model):
        time.sleep(0.2)
        return 1.0

    counts = {}
    for seconds in (0, 0.01, 1000):
        path = tmp_path / f"{seconds}.jsonl"
        autotune(tiny, tiny_batches, eval_func=slow, sampling_sizes=[8, 16], tuning_time=seconds, record=path)
        counts[seconds] = len(read_record(path)[2])
    assert counts == {0: 1, 0.01: 1, 1000: 4}


def test_positional_arguments_of_both_versions(tiny, tiny_batches):
    x = tiny_batches[0]
    seed = autotune(tiny, tiny_batches, None, None, None, {"alpha": 0.3}, [16], {"absolute": 0.5}, 0)
    assert torch.equal(
        convert(seed)(x), convert(autotune(tiny, tiny_batches, smoothquant_args={"alpha": 0.3}, sampling_sizes=[16]))(x)
    )
    older = autotune(tiny, tiny_batches, None, None, None, [16], {"absolute": 0.5}, 0)
    newer = autotune(tiny, tiny_batches, sampling_sizes=[16], accuracy_criterion={"absolute": 0.5})
    assert torch.equal(convert(older)(x), convert(newer)(x))
    none = autotune(tiny, tiny_batches, None, None, None, None, {"absolute": 0.5}, 0)
    assert convert(none)(x).shape == (8, 8)


def test_op_type_dict_leaves_types_and_names_in_float(tiny, tiny_batches):
    fp32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}
    converted = convert(autotune(tiny, tiny_batches, op_type_dict={"add": fp32, "2": fp32}))
    assert float_linears(converted) == ["2"]
    with pytest.raises(ValueError, match="op_type_dict: it leaves all layers in float"):
        autotune(tiny, tiny_batches, op_type_dict={"Linear": fp32})


def test_a_record_that_exists_is_gone_on_with(tiny, tiny_batches, tmp_path):
    path = tmp_path / "trials.jsonl"
    calls = []

    def evaluate(model):
        calls.append(model)
        return -model(tiny_batches[0]).square().mean().item()

    options = {"eval_func": evaluate, "tuning_time": 1000, "record": path}
    first = autotune(tiny, tiny_batches, **options)
    done = len(calls)
    lines = path.read_text().splitlines()
    head = json.loads(lines[0])
    del head["best"]
    path.write_text("\n".join([json.dumps(head), lines[1]]) + "\n")
    again = autotune(tiny, tiny_batches, **options)
    assert len(calls) == done + done - 2, "the float model and the first trial are not measured again"
    assert path.read_text().splitlines()[1] == lines[1]
    assert torch.equal(convert(first)(tiny_batches[0]), convert(again)(tiny_batches[0]))
    with pytest.raises(ValueError, match=r"record: .*of another search: its seed is 0, not 1"):
        autotune(tiny, tiny_batches, seed=1, **options)


def test_bad_arguments(tiny, tiny_batches, tmp_path):
    for error, match, options in (
        (
            TypeError,
            "eval_func: expected a number.*got a tensor; return metric.item",
            {"eval_func": lambda m: torch.tensor(1.0)},
        ),
        (TypeError, "eval_func: expected a number.*got None", {"eval_func": lambda m: None}),
        (ValueError, "eval_func: expected a finite number, got nan", {"eval_func": lambda m: float("nan")}),
        (TypeError, "eval_func: expected a function", {"eval_func": 3}),
        (TypeError, "calib_func: expected a function", {"calib_func": "x"}),
        (ValueError, "calib_dataloader: expected at least one batch, got none", {"calib_dataloader": []}),
        (TypeError, "calib_dataloader: expected an iterable", {"calib_dataloader": None}),
        (TypeError, "calib_dataloader: expected items", {"calib_dataloader": ["text"]}),
        (TypeError, "accuracy_criterion: expected a dict", {"accuracy_criterion": 0.01}),
        (ValueError, "accuracy_criterion: expected one key", {"accuracy_criterion": {"relative": 1, "absolute": 1}}),
        (ValueError, "accuracy_criterion: expected one key", {"accuracy_criterion": {"percent": 1}}),
        (TypeError, "accuracy_criterion: expected a number", {"accuracy_criterion": {"relative": "1%"}}),
        (ValueError, "accuracy_criterion: expected a finite", {"accuracy_criterion": {"relative": float("nan")}}),
        (ValueError, "accuracy_criterion: the float model has the metric 0", {"eval_func": lambda m: 0}),
        (ValueError, "tuning_time: expected seconds", {"tuning_time": -1}),
        (ValueError, "sampling_sizes: expected positive", {"sampling_sizes": [0]}),
        (TypeError, "sampling_sizes: expected a list", {"sampling_sizes": "100"}),
        (
            ValueError,
            "'Lineer' is no known operator type",
            {"op_type_dict": {"Lineer": {"weight": {"dtype": ["fp32"]}}}},
        ),
        (ValueError, "smoothquant_args: unknown keys", {"smoothquant_args": {"beta": 1}}),
        (ValueError, "record: the directory", {"record": tmp_path / "no" / "file"}),
    ):
        arguments = {"calib_dataloader": tiny_batches} | options
        with pytest.raises(error, match=match):
            autotune(tiny, **arguments)
    with pytest.raises(TypeError, match="model: expected a torch"):
        autotune("model", tiny_batches)
