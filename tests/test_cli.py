import json
import shutil
from pathlib import Path

import datasets  # noqa: F401  its log keeps the stream of its import: here one that outlives a test
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant import cli, data
from ipex_quant.checkpoints import open_gguf
from ipex_quant.llm import exporting
from ipex_quant.nn.linears import is_linear
from ipex_quant.recipes.best import BEST_RECIPES


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    """A two-layer model with the embedded model's tokenizer and shape, quick to quantize."""
    folder = tmp_path_factory.mktemp("models") / "float"
    model = AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    model.config.num_hidden_layers = 2
    small = LlamaForCausalLM(model.config)
    small.load_state_dict(model.state_dict(), strict=False)
    small.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(data.held_out_text()[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized_dir(float_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "quantized"
    assert cli.main(["quantize", str(float_dir), "--recipe", "w4a8-g128", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def int8_dir(float_dir, tmp_path_factory):
    """SmoothQuant, calibrated on JSON lines with two columns of text."""
    folder = tmp_path_factory.mktemp("models")
    passages = [passage for passage in data.calibration_text().split("\n\n")[:200] if passage]
    lines = (json.dumps({"title": "of no use", "body": passage}) for passage in passages)
    (folder / "passages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--recipe", "w8a8-smoothquant", "--dataset", str(folder / "passages.jsonl"), "--column", "body"]
    assert cli.main(["quantize", str(float_dir), *arguments, "--samples", "3", "--out", str(folder / "int8")]) == 0
    return folder / "int8"


def test_quantize_writes_a_smaller_directory_that_loads(quantized_dir, float_dir):
    size = {d: sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (quantized_dir, float_dir)}
    assert 0 < size[quantized_dir] < size[float_dir]
    model = ipex.llm.load(quantized_dir)
    assert not any(is_linear(module) for module in model.modules())


def test_bits_choose_a_recipe_and_say_why(float_dir, text_file, tmp_path, capsys):
    options = ["--dataset", str(text_file), "--samples", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["quantize", str(float_dir), "--bits", "3", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"--bits 3: recipe {BEST_RECIPES[3].name}: {BEST_RECIPES[3].why}\n")
    modules = ipex.llm.load(tmp_path / "out").model.layers.modules()
    assert {module.scheme.dtype.bits for module in modules if hasattr(module, "scheme")} == {3}
    for wrong in (["--bits", "7"], ["--bits", "4", "--recipe", "w8a16"], []):
        with pytest.raises(SystemExit):
            cli.main(["quantize", str(float_dir), *wrong, "--out", str(tmp_path / "other")])


def test_nothing_is_there_without_the_tokenizer(float_dir, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    assert cli.main(["quantize", str(float_dir), "--recipe", "w8a16", "--out", str(tmp_path / "out")]) == 2
    assert "disk full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_generate_prints_the_prompt_and_its_continuation(quantized_dir, capsys):
    assert cli.main(["generate", str(quantized_dir), "--prompt", "Return the", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Return the")
    assert len(printed.removesuffix("\n")) > len("Return the")


def test_eval_prints_every_measure(quantized_dir, float_dir, text_file, capsys):
    arguments = ["--reference", str(float_dir), "--text", str(text_file), "--max-tokens", "300"]
    assert cli.main(["eval", str(quantized_dir), *arguments]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    values = {name: float(value.split()[0].rstrip("%")) for name, value in printed.items()}
    assert list(values) == [
        *("tokens", "reference perplexity", "perplexity", "KL(reference||model)", "KL, 99th percentile"),
        *("KL, largest", "top-1 agreement"),
    ]
    assert values["tokens"] == 300
    assert values["KL(reference||model)"] < values["KL, 99th percentile"] < values["KL, largest"]
    assert 0 < values["KL(reference||model)"] < 1
    assert 50 < values["top-1 agreement"] <= 100


def test_eval_compares_with_a_quantized_model_and_a_gguf_file(quantized_dir, int8_dir, text_file, capsys):
    folder = Path(__file__).parent / "llm" / "data" / "gguf_q5_0"
    found = []
    for model, reference in (
        (quantized_dir, quantized_dir),
        (folder, folder / "model.gguf"),
        (quantized_dir, int8_dir),
    ):
        arguments = ["--reference", str(reference), "--text", str(text_file), "--max-tokens", "60"]
        assert cli.main(["eval", str(model), *arguments]) == 0
        printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        found.append(float(printed["KL(reference||model)"].split()[0]))
    assert max(found[:2]) < 0.1 * found[2]


def test_an_int8_model_generates_is_measured_and_explained(int8_dir, float_dir, text_file, capsys):
    assert cli.main(["generate", str(int8_dir), "--prompt", "Return the", "--max-new-tokens", "5"]) == 0
    assert len(capsys.readouterr().out.removesuffix("\n")) > len("Return the")
    arguments = ["--reference", str(float_dir), "--text", str(text_file), "--max-tokens", "300"]
    assert cli.main(["eval", str(int8_dir), *arguments]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert 0 < float(printed["KL(reference||model)"].split()[0]) < 0.01
    assert cli.main(["explain", str(int8_dir)]) == 0
    assert "15 modules quantized" in capsys.readouterr().out


def test_the_files_of_an_int8_model_hold_codes_of_the_smoothed_weight(int8_dir, float_dir):
    codes, plain = (load_file(d / "model.safetensors") for d in (int8_dir, float_dir))
    name = "model.layers.0.mlp.down_proj"
    scaled = codes[f"{name}.codes"].float() * codes[f"{name}.scales"] * codes[f"{name}.smoothing_factor"]
    weight = plain[f"{name}.weight"].float()
    assert (scaled - weight).norm() < 0.05 * weight.norm()


def test_explain_names_every_quantized_module(quantized_dir, capsys):
    assert cli.main(["explain", str(quantized_dir)]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in printed
    assert "lm_head" in printed


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "auto_round"])
def test_weights_are_calibrated_on_the_given_text(float_dir, text_file, tmp_path, quantized_dir, algorithm):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"algorithm: {algorithm}\nweight_dtype: int4\nweight_qscheme: asymmetric\ngroup_size: 32\nlowp_mode: int8\n"
        "head_dtype: int8\nembedding_dtype: int8\nsequence_length: 64\n" + "steps: 5\n" * (algorithm == "auto_round")
    )
    out = tmp_path / "out"
    arguments = ["--recipe", str(recipe), "--out", str(out), "--dataset", str(text_file), "--samples", "4"]
    arguments += ["--work-dir", str(tmp_path / "work")] * (algorithm == "auto_round")
    assert cli.main(["quantize", str(float_dir), *arguments]) == 0
    found, rtn = (load_file(next(d.glob("*.safetensors"))) for d in (out, quantized_dir))
    assert found.keys() == rtn.keys()
    assert any(not torch.equal(found[name], rtn[name]) for name in found)
    assert cli.main(["generate", str(out), "--prompt", "Return the", "--max-new-tokens", "5"]) == 0


@pytest.mark.parametrize("arguments", [[], ["quantize"], ["frobnicate"], ["generate", "x", "--max-new-tokens", "0"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: ipex-quant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("quantize {float} --recipe w3 --out {tmp}/out", "expected a file or one of"),
        ("quantize {tmp}/none --recipe w8a16 --out {tmp}/out", "with a config.json"),
        (
            "quantize {float} --recipe w4a8-gptq-g128 --work-dir {tmp}/work --out {tmp}/out",
            "--work-dir: recipe w4a8-gptq-g128 keeps no unfinished work",
        ),
        ("export {float} --format gptq --out {tmp}/out", "expected a quantized model, got a float one"),
        ("convert {float} --format gptq --out {tmp}/broken", "expected a quantized model, got a float one"),
        (
            "quantize {tmp}/broken --recipe w8a16 --out {tmp}/out",
            "broken/model.safetensors: truncated or no safetensors file",
        ),
        ("quantize {float} --recipe w8a16 --out {tmp}/broken", "exists and is not empty"),
        ("quantize {float} --recipe w8a16 --out {tmp}/out --dataset {tmp}/short.txt", "does not calibrate"),
        (
            "quantize {float} --recipe w4a8-gptq-g128 --out {tmp}/out --dataset {tmp}/short.txt",
            "one window of 512 tokens",
        ),
        ("quantize {float} --recipe w4a8-gptq-g128 --out {tmp}/out --dataset {tmp}/none.txt", "none.txt"),
        ("quantize {float} --recipe w8a8-dynamic --out {tmp}/out --samples 3", "does not calibrate"),
        ("quantize {float} --recipe w8a16 --out {tmp}/out --column text", "does not calibrate"),
        ("quantize {float} --recipe w8a8-static --out {tmp}/out --dataset no-such/dataset", "--dataset: source: 'no-s"),
        ("quantize {float} --recipe w8a8-static --out {tmp}/out --dataset {tmp}/short.txt --column x", "column: expe"),
        ("quantize {float} --recipe w8a8-static --out {tmp}/out --dataset {tmp}/short.csv", "expected files of one"),
        ("quantize {float} --recipe w8a8-static --out {tmp}/out --dataset {tmp}/bad.jsonl", "cannot read"),
        ("generate {tmp}/none --prompt x", "with a config.json"),
        ("explain {tmp}/none", "with a config.json"),
    ],
)
def test_bad_input_is_one_line_on_stderr(command, message, float_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    shutil.copytree(float_dir, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not safetensors")
    for name in ("short.txt", "short.csv", "bad.jsonl"):
        (tmp_path / name).write_text("short")
    arguments = command.format(float=float_dir, tmp=tmp_path).split()
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("ipex-quant ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"ipex-quant {arguments[0]}: error: ")
    assert message in errors[0]
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match=r"with a config\.json"):
        cli.main(["explain", str(tmp_path), "--traceback"])


def test_export_and_convert(quantized_dir, tmp_path, capsys):
    with pytest.warns(UserWarning, match="embeddings are in float"):
        assert cli.main(["export", str(quantized_dir), "--format", "gptq", "--out", str(tmp_path / "gptq")]) == 0
    assert "gptq, " in capsys.readouterr().out
    into = ["--format", "compressed-tensors", "--out", str(tmp_path / "packed")]
    assert cli.main(["convert", str(tmp_path / "gptq"), *into]) == 0
    texts = []
    for directory in (tmp_path / "gptq", tmp_path / "packed"):
        assert cli.main(["generate", str(directory), "--prompt", "Return the", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]
    stored = [
        ipex.llm.load(directory).model.layers[1].mlp.up_proj for directory in (quantized_dir, tmp_path / "packed")
    ]
    assert torch.equal(stored[0].quantized_weight().codes, stored[1].quantized_weight().codes)


@pytest.mark.filterwarnings("ignore:embeddings are in float")
def test_a_gguf_file_is_converted(tmp_path, capsys):
    source = Path(__file__).parent / "llm" / "data" / "gguf_q5_0" / "model.gguf"
    assert cli.main(["convert", str(source), "--format", "gguf", "--out", str(tmp_path / "out")]) == 0
    old, new = open_gguf(source), open_gguf(tmp_path / "out" / "model.gguf")
    assert old.metadata["tokenizer.ggml.tokens"] == new.metadata["tokenizer.ggml.tokens"]
    assert all(torch.equal(tensor.stored[...], new.tensors[name].stored[...]) for name, tensor in old.tensors.items())
    into = ["--format", "compressed-tensors", "--out", str(tmp_path / "packed")]
    assert cli.main(["convert", str(source), *into]) == 0
    texts = []
    for path in (source, tmp_path / "packed"):
        assert cli.main(["generate", str(path), "--prompt", "Return the", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]


def test_the_formats_are_those_of_export():
    assert exporting.FORMATS == cli.EXPORT_FORMATS


@pytest.mark.filterwarnings("ignore:embeddings are in float")
def test_export_says_which_layer_a_format_does_not_hold(quantized_dir, tmp_path, capsys):
    assert cli.main(["export", str(quantized_dir), "--format", "awq", "--out", str(tmp_path / "out")]) == 2
    assert "lm_head: its weight is INT8, the format holds INT4; leave the layer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ["quantize_config.json", "config.json"])
def test_quantize_takes_no_quantized_checkpoint(float_dir, tmp_path, capsys, config):
    """Whose method is unknown: transformers would make random weights."""
    directory = shutil.copytree(float_dir, tmp_path / "strange")
    content = json.loads((directory / "config.json").read_text()) if config == "config.json" else {}
    content |= {"quantization_config": {"quant_method": "odd"}} if content else {"quant_method": "odd"}
    (directory / config).write_text(json.dumps(content))
    assert cli.main(["quantize", str(directory), "--recipe", "w8a16", "--out", str(tmp_path / "out")]) == 2
    assert "quantized already, by 'odd'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_datasets_are_mixed_by_their_weights(tmp_path):
    odd = tmp_path / "a.txt:3"
    odd.touch()
    assert cli._mixed(None) is None
    assert cli._mixed(["a.txt:2"]) == "a.txt"
    assert cli._mixed(["a.txt:2", "b.jsonl", "org/name:0.5"]) == {"a.txt": 2, "b.jsonl": 1, "org/name": 0.5}
    assert cli._mixed([str(odd), "c:\\x.txt"]) == {str(odd): 1, "c:\\x.txt": 1}
    with pytest.raises(ValueError, match=r"--dataset: a\.txt is given twice"):
        cli._mixed(["a.txt", "a.txt:2"])
