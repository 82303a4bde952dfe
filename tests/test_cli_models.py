"""`ipex-quant` with directories of all sorts: each model stays what its configuration says, or is refused."""

import json
import shutil
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import ipex_quant as ipex
from ipex_quant import cli, data

TOKENIZER = data.embedded_model_dir()
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
IMAGES = {"image_size": 16, "patch_size": 8, **SIZES}
TEXT = {"vocab_size": 4096, "max_position_embeddings": 128, **SIZES}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
AUDIO = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 100,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "decoder_start_token_id": 1,
    **TOKENS,
}


def ids(*shape, top=100):
    return torch.randint(3, top, shape, generator=torch.Generator().manual_seed(0))


def pixels(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def clip():
    return tf.CLIPModel(tf.CLIPConfig(text_config={**TEXT, **TOKENS}, vision_config=IMAGES, projection_dim=32))


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**IMAGES))


def llava():
    vision, text = tf.CLIPVisionConfig(**IMAGES), tf.LlamaConfig(**TEXT, **TOKENS)
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=5, image_seq_length=4, vision_feature_layer=-1
    )
    return tf.LlavaForConditionalGeneration(config)


def whisper():
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**AUDIO))


def t5():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, vocab_size=4096, decoder_start_token_id=0))


def with_images(tokens):
    tokens[:, 1:5] = 5
    return tokens


MODELS = {
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)), None),
    "masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)), None),
    "t5": (t5, None),
    "vit": (vit, lambda: {"pixel_values": pixels(3, 3, 16, 16)}),
    "whisper": (whisper, lambda: {"input_features": pixels(3, 8, 32), "decoder_input_ids": ids(3, 4)}),
    "clip": (clip, lambda: {"input_ids": ids(3, 7), "pixel_values": pixels(3, 3, 16, 16)}),
    "llava": (llava, lambda: {"input_ids": with_images(ids(3, 9)), "pixel_values": pixels(3, 3, 16, 16)}),
}
"""Makers of models, and of what those are called with that are not called with text."""


@pytest.fixture(scope="module", params=MODELS)
def directories(request, tmp_path_factory):
    """A model's directory, the arguments that tell what it is called with, and the directory of the quantized one."""
    folder = tmp_path_factory.mktemp(request.param)
    make, inputs = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder / "float")
    if inputs is None or request.param == "llava":
        tf.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "float")
    if inputs is None:
        (folder / "text.txt").write_text(data.held_out_text()[:1000])
        called = ["--text", str(folder / "text.txt")]
    else:
        (folder / "float" / "preprocessor_config.json").write_text('{"mine": 1}')
        save_file(inputs(), folder / "inputs.safetensors")
        called = ["--inputs", str(folder / "inputs.safetensors")]
    out = str(folder / "out")
    assert cli.main(["quantize", str(folder / "float"), "--recipe", "w8a16", "--out", out, "--dtype", "float32"]) == 0
    return folder / "float", called, folder / "out"


def test_a_model_stays_what_it_is(directories):
    source, _, out = directories
    (name,) = json.loads((source / "config.json").read_text())["architectures"]
    model = ipex.llm.load(out)
    assert type(model).__name__ == name
    assert any(isinstance(module, ipex.nn.WeightOnlyQuantizedLinear) for module in model.modules())
    made = {"preprocessor_config.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} & made == {file.name for file in source.iterdir()} & made


def test_eval_has_a_metric_for_it(directories, capsys):
    source, called, out = directories
    assert cli.main(["eval", str(out), "--reference", str(source), *called, "--sequence-length", "32"]) == 0
    printed = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines() if "error of" in line)
    (value,) = printed.values()
    assert 0 < float(value.split()[0]) < 0.1


def test_explain_shows_it(directories, capsys):
    assert cli.main(["explain", str(directories[2])]) == 0
    assert " modules quantized" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "whisper"])
def test_a_recipe_that_calibrates(name, tmp_path, capsys):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    make().eval().save_pretrained(tmp_path / "float")
    arguments = ["--samples", "2"]
    if inputs is None:
        tf.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "float")
        recipe = tmp_path / "short.yaml"
        recipe.write_text("description: short\nalgorithm: smoothquant\nsequence_length: 32\n")
    else:
        recipe = "w8a8-smoothquant"
        (tmp_path / "float" / "preprocessor_config.json").write_text("{}")
        save_file(inputs(), tmp_path / "inputs.safetensors")
        arguments = ["--inputs", str(tmp_path / "inputs.safetensors")]
    command = ["quantize", str(tmp_path / "float"), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    if inputs is not None:
        assert cli.main(command) == 2
        assert "is not called with text: give --inputs" in capsys.readouterr().err
    assert cli.main([*command, *arguments]) == 0
    assert any(isinstance(module, ipex.nn.Int8Linear) for module in ipex.llm.load(tmp_path / "out").modules())


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_autotune_has_a_metric_for_it(name, tmp_path, capsys):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    make().eval().save_pretrained(tmp_path / "float")
    arguments = ["--samples", "2", "--sequence-length", "32"]
    if inputs is None:
        tf.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "float")
    else:
        (tmp_path / "float" / "preprocessor_config.json").write_text("{}")
        save_file(inputs(), tmp_path / "inputs.safetensors")
        arguments += ["--inputs", str(tmp_path / "inputs.safetensors")]
    command = ["autotune", str(tmp_path / "float"), "--recipe", "w8a8-static", "--max-loss", "0.5", *arguments]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert ipex.llm.load(tmp_path / "out").config.architectures == [type(make()).__name__]


# ------------------------------------------------------------------------------------------------------ what is refused
CODE = """
import os, pathlib
pathlib.Path(os.environ["MARK"]).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig): model_type = "mine"
class Mine(LlamaForCausalLM): config_class = MineConfig
class Tok: pass
"""


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def small(tmp_path):
    """A causal language model with its tokenizer."""
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **TOKENS)).save_pretrained(tmp_path / "float")
    tf.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def quantize(directory, *options):
    return cli.main(["quantize", str(directory), "--recipe", "w8a16", "--out", str(directory.parent / "out"), *options])


def test_a_missing_tensor_is_not_made_up(small, capsys):
    tensors = load_file(small / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    assert quantize(small) == 2
    assert "lacks 1 tensors of a LlamaForCausalLM, such as ['model.layers.0.self_a" in capsys.readouterr().err
    assert [path.name for path in small.parent.iterdir()] == ["float"]


def test_what_is_quantized_is_not_quantized_again(small, capsys):
    assert quantize(small) == 0
    command = ["quantize", str(small.parent / "out"), "--recipe", "w4a8-g128", "--out", str(small.parent / "again")]
    assert cli.main(command) == 2
    assert "expected a float model, got one that is quantized already, by 'ipex_quant'" in capsys.readouterr().err


def test_an_index_that_leads_out_of_the_directory_is_refused(small, capsys):
    shutil.move(small / "model.safetensors", small.parent / "elsewhere.safetensors")
    names = load_file(small.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    assert quantize(small) == 2
    assert "expected file names beside the index" in capsys.readouterr().err


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that is there when code of a model has run."""
    monkeypatch.setenv("MARK", str(tmp_path / "MARK"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it must not ask"))
    return tmp_path / "MARK"


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_of_a_model_runs_when_it_is_trusted_only(small, mark, capsys, model_type):
    (small / "mine.py").write_text(CODE)
    names = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    edit(small / "config.json", model_type=model_type, architectures=["Mine"], auto_map=names)
    assert quantize(small) == 2
    assert not mark.exists()
    assert "trust_remote_code" in capsys.readouterr().err
    if model_type == "llama":
        return  # transformers finds that its classes do not fit each other
    assert quantize(small, "--trust-remote-code") == 0
    assert mark.exists()
    out = str(small.parent / "out")
    assert cli.main(["generate", out, "--prompt", "a", "--max-new-tokens", "2"]) == 2
    assert "Mine is code in the directory, which is not run" in capsys.readouterr().err
    assert cli.main(["generate", out, "--prompt", "a", "--max-new-tokens", "2", "--trust-remote-code"]) == 0


def test_code_of_a_tokenizer_is_not_run(small, mark):
    (small / "mine.py").write_text(CODE)
    edit(small / "tokenizer_config.json", tokenizer_class="Tok", auto_map={"AutoTokenizer": ["mine.Tok", "mine.Tok"]})
    quantize(small)
    assert not mark.exists()


def test_code_in_a_quantized_model_is_not_run(small, mark):
    assert quantize(small) == 0
    out = small.parent / "out"
    (out / "mine.py").write_text(CODE)
    edit(out / "config.json", auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"})
    assert cli.main(["generate", str(out), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:autotune")
def test_no_recipe_within_the_budget_is_a_failure(small, capsys):
    out = small.parent / "out"
    text = small.parent / "text.txt"
    text.write_text(data.held_out_text()[:1000])
    options = ["--samples", "2", "--max-tokens", "64", "--sequence-length", "32", "--max-loss", "-0.9"]
    command = ["autotune", str(small), "--recipe", "w8a8-static", "--text", str(text), *options, "--time", "0.1"]
    assert cli.main([*command, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "no recipe is within --max-loss -0.9" in printed.err
    assert "INT8 static" in printed.out
    assert not out.exists()


def test_errors_are_not_longer_than_a_screen(small, capsys):
    edit(small / "config.json", architectures=["x" * 100000])
    assert quantize(small) == 2
    assert len(capsys.readouterr().err) < 2000
