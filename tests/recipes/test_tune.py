import json
from dataclasses import replace

import datasets  # noqa: F401 - its logger keeps the stderr that it finds when imported, which must not be a test's
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant import cli, data, evaluation
from ipex_quant.autotune import Report
from ipex_quant.autotune.constraints import float_layers
from ipex_quant.nn import QuantizedModule
from ipex_quant.numerics.scheme import WoqWeightDtype
from ipex_quant.recipes.recipe import AutoRound, load_recipe
from ipex_quant.recipes.tune import tuning_arguments


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    """A one-layer model with the embedded model's tokenizer and shape, quick to tune."""
    folder = tmp_path_factory.mktemp("models") / "float"
    model = AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    model.config.num_hidden_layers = 1
    small = LlamaForCausalLM(model.config)
    small.load_state_dict(model.state_dict(), strict=False)
    small.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("w8a8-smoothquant", []), ("w4a8-g128", ["--max-bytes-per-weight", "0.56"])],
)
def test_the_command_tunes_reports_and_saves(float_dir, tmp_path, capsys, recipe, options):
    text = tmp_path / "text.txt"
    text.write_text(data.held_out_text()[:6000], encoding="utf-8")
    files = [
        "--text",
        text,
        "--report",
        tmp_path / "o.html",
        "--report",
        tmp_path / "o.json",
        "--out",
        tmp_path / "out",
    ]
    sizes = ["--samples", "4", "--sequence-length", "128", "--max-tokens", "256", "--max-loss", "0.5"]
    arguments = ["autotune", float_dir, "--recipe", recipe, *options, *files, *sizes]
    assert cli.main([str(argument) for argument in arguments]) == 0
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "candidate"
    assert line.startswith("*p")
    report = json.loads((tmp_path / "o.json").read_text())
    best = report["trials"][report["best"]]
    assert best["met"]
    assert "<svg" in (tmp_path / "o.html").read_text()
    model = ipex.llm.load(tmp_path / "out")
    assert sum(isinstance(module, QuantizedModule) for module in model.modules()) == (9 if options else 8)
    assert evaluation.model_bytes(model) == best["model_bytes"]
    if options:
        assert best["bytes_per_weight"] <= 0.56


def test_a_size_gives_a_recipe_a_report_and_a_model(float_dir, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "trials.jsonl"
    sizes = ["--samples", "4", "--sequence-length", "128", "--max-tokens", "256"]
    command = ["autotune", str(float_dir), "--size", "1.5MB", *sizes, "--record", str(record), "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "GPTQ mixed" in printed
    assert "allowed loss: any" in printed
    (trial,) = Report.of(record).trials
    model = ipex.llm.load(out)
    assert evaluation.model_bytes(model) == trial.model_bytes <= 1_500_000
    tokenizer, reference = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(float_dir)
    found = evaluation.compare(reference.float(), model, tokenizer, data.held_out_text(), 128, 256)
    assert found.kl_divergence == pytest.approx(-trial.metric, rel=0.05)
    assert "<svg" in (out / "report.html").read_text()
    again = ["quantize", str(float_dir), "--recipe", str(out / "recipe.yaml"), "--out", str(tmp_path / "again")]
    assert cli.main(again) == 0
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", out))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_bad_input(float_dir, tmp_path, capsys):
    assert cli.main(["autotune", str(float_dir)]) == 2
    assert "--text: expected a file" in capsys.readouterr().err
    assert cli.main(["autotune", "embedded", "--recipe", "w8a8-dynamic"]) == 2
    assert "w8a8-dynamic: expected a static or weight-only one" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["autotune", "embedded", "--out", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    for options, message in (
        (["--size", "many"], "size: expected a number of bytes, or one as 120MB"),
        (["--size", "3MB", "--max-loss", "1"], "--max-loss: it is no limit beside --size"),
        (["--max-kl", "0"], "max_kl: expected a number above 0"),
        (["--size", "3MB", "--recipe", "w8a8-static"], "smoothquant_args, calib_func: they are for static INT8"),
        (["--size", "1MB", "--max-bytes-per-weight", "1"], "size, max_bytes_per_weight: both say how large"),
        (["--size", "1MB", "--algorithms", "gptq", "other"], "algorithms: expected some of gptq, awq, rtn, auto_round"),
        (["--algorithms", "gptq"], "algorithms: recipe w8a8-smoothquant is static INT8"),
    ):
        assert cli.main(["autotune", "embedded", "--samples", "1", *options]) == 2
        assert message in capsys.readouterr().err


def test_algorithms_are_those_that_are_asked_for():
    algorithms = ["gptq", "auto_round"]
    for recipe in (None, load_recipe("w4a8-awq-g128")):
        space = tuning_arguments(recipe, algorithms)["quantization_config"]
        assert space.algorithms == ("gptq", "auto_round")
        own = ("gptq", "rtn") if recipe is None else ("awq", "rtn")
        assert tuning_arguments(recipe)["quantization_config"].algorithms == own
    tuned = replace(load_recipe("w4a8-awq-g128"), settings=AutoRound(weight_dtype=WoqWeightDtype.INT4))
    assert tuning_arguments(tuned)["quantization_config"].algorithms == ("auto_round", "rtn")
    with pytest.raises(ValueError, match="algorithms: recipe w8a8-static is static INT8, which has none"):
        tuning_arguments(load_recipe("w8a8-static"), algorithms)


def test_modules_that_a_recipe_skips_stay_in_float():
    recipe = replace(load_recipe("w8a8-static"), skip=("lm_head", r"model\.layers\.0"))
    arguments = tuning_arguments(recipe)
    assert arguments["smoothquant_args"] == {"alpha": [None]}
    names = list(arguments["op_type_dict"])
    model = nn.Module()
    model.lm_head = nn.Linear(2, 2)
    model.other = nn.Linear(2, 2)
    assert float_layers(model, {names[0]: arguments["op_type_dict"][names[0]]}) == {"lm_head"}
