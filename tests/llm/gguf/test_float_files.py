"""GGUF files in float are quantized as a directory with the same model is."""

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.cli import main
from ipex_quant.nn import QuantizedModule
from ipex_quant.recipes import load
from ipex_quant.recipes.recipe import Awq, Gptq, Recipe, Static, WeightOnly

RECIPES = {
    "rtn": WeightOnly(group_size=32),
    "gptq": Gptq(group_size=32, samples=2, sequence_length=16),
    "awq": Awq(group_size=32, samples=2, sequence_length=16, tokens=16),
    "static": Static(samples=2, sequence_length=16),
}
BATCHES = [{"input_ids": torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(i))} for i in range(2)]
EPS = 2.0**-20  # a float32, as files have it


def make(name, make_tiny, dtype):
    model = make_tiny(name, rms_norm_eps=EPS)
    return model.to(dtype).float()


@pytest.mark.filterwarnings("ignore:(gptq|awq|GPTQ|most weights)")
@pytest.mark.parametrize(
    ("name", "recipe", "kind"),
    [
        *(("llama", recipe, "F16") for recipe in RECIPES),
        *(("llama", "rtn", kind) for kind in ("F32", "BF16")),
        *(("qwen3moe", recipe, "F32") for recipe in ("rtn", "gptq")),
        *((name, "rtn", "F32") for name in ("gemma4-experts", "gpt-oss", "mixtral")),
    ],
)
def test_the_result_is_that_of_the_directory(name, recipe, kind, make_tiny, gguf_of, tmp_path):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    model = make(name, make_tiny, dtype)
    arch = {"mixtral": "llama"}.get(name, name.removesuffix("-experts"))
    path = gguf_of(model, name, arch, kind)
    model.save_pretrained(tmp_path / "directory")
    settings = Recipe(recipe, RECIPES[recipe])
    loaded, before = load.quantized(settings, path, torch.float32, BATCHES)
    expected, size = load.quantized(settings, tmp_path / "directory", torch.float32, BATCHES)
    assert before == size
    kinds = [type(module) for module in loaded.modules() if isinstance(module, QuantizedModule)]
    assert kinds == [type(module) for module in expected.modules() if isinstance(module, QuantizedModule)] != []
    assert torch.equal(loaded(**BATCHES[0]).logits, expected(**BATCHES[0]).logits)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantized_file_says_what_to_do(recipe, make_tiny, gguf_of):
    path = gguf_of(make_tiny("qwen2"), "qwen2", "qwen2", "Q8_0")
    message = r"expected a float model, got one that is quantized already, as Q8_0; .*`ipex-quant convert` writes it"
    with pytest.raises(ValueError, match=message):
        load.quantized(Recipe(recipe, RECIPES[recipe]), path, torch.float32, BATCHES)


def test_the_command(make_tiny, gguf_of, tmp_path, capsys):
    tokens = [*"abcdefghijklmnopqrstuvwxyz", "\u0120", *(f"<{number}>" for number in range(69))]
    tokenizer = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": [1] * 96, "merges": ["t h"]}
    tokenizer["tokens"][40] = "th"
    entries = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    path = gguf_of(make_tiny("qwen2"), "qwen2", "qwen2", "F16", **entries)
    out = tmp_path / "out"
    assert main(["quantize", str(path), "--recipe", "w4a16-g128", "--out", str(out)]) == 0
    assert "before" in capsys.readouterr().out
    assert any(isinstance(module, QuantizedModule) for module in ipex.llm.load(out).modules())
    assert ipex.llm.load_tokenizer(out)("that").input_ids == ipex.llm.load_tokenizer(path)("that").input_ids
    text = tmp_path / "text.txt"
    text.write_text("that is the text " * 40)
    assert main(["eval", str(out), "--reference", str(path), "--text", str(text), "--sequence-length", "16"]) == 0
    assert "perplexity" in capsys.readouterr().out
    quantized = gguf_of(make_tiny("qwen2"), "qwen2", "qwen2", "Q8_0", **entries)
    assert main(["quantize", str(quantized), "--recipe", "w4a16-g128", "--out", str(tmp_path / "no")]) == 2
    assert "quantized already, as Q8_0" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
