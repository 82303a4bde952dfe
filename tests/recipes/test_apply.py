from copy import deepcopy

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ipex_quant import data
from ipex_quant.nn import Int8Linear
from ipex_quant.recipes.apply import apply_recipe, calibration_data
from ipex_quant.recipes.recipe import Dynamic, Gptq, Recipe, SmoothQuant, Static, load_recipe

SMALL = {"samples": 8, "sequence_length": 64}


class CountingTokenizer:
    """A token for every word, numbered."""

    eos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": list(range(len(text.split())))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)


@pytest.mark.parametrize("algorithm", [Gptq, Static, SmoothQuant])
def test_a_recipe_says_how_much_is_read(algorithm, tmp_path):
    (tmp_path / "text.txt").write_text("word " * 100)
    recipe = Recipe("mine", algorithm(samples=4, sequence_length=10))
    batches = list(calibration_data(recipe, CountingTokenizer(), tmp_path / "text.txt"))
    assert [batch["input_ids"].tolist() for batch in batches] == [[list(range(i, i + 10))] for i in (0, 10, 20, 30)]


def test_without_a_source_the_embedded_models_text_is_read(tokenizer):
    recipe = Recipe("mine", SmoothQuant(samples=4, sequence_length=64))
    text = data.calibration_text()
    batches = list(calibration_data(recipe, tokenizer))
    assert len(batches) == 4
    for batch in batches:
        passages = tokenizer.decode(batch["input_ids"][0]).split(tokenizer.eos_token)
        assert all(passage in text for passage in passages)


def test_no_text_is_read_for_a_recipe_that_does_not_calibrate(tokenizer):
    assert calibration_data(load_recipe("w8a8-dynamic"), tokenizer, "no such file") == ()


@pytest.mark.parametrize("name", ["w4a8-gptq-g128", "w4a8-awq-g128", "w8a8-smoothquant", "w8a8-static"])
def test_calibration_without_text_is_refused(name):
    with pytest.raises(ValueError, match=f"recipe {name}: it needs calibration text, got none"):
        apply_recipe(load_recipe(name), torch.nn.Linear(8, 8))


@pytest.mark.parametrize(
    "settings", [SmoothQuant(**SMALL), Static(**SMALL), Static(observer="min_max", **SMALL), Dynamic()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_quantized_but_for_what_is_skipped(model, tokenizer, settings, dtype):
    inputs = {"input_ids": torch.arange(20)[None]}
    expected = model(**inputs).logits
    recipe = Recipe("mine", settings, skip=("lm_head", r".*layers\.1\.mlp\.down_proj"))
    quantized = apply_recipe(recipe, model, calibration_data(recipe, tokenizer), dtype)
    linears = {name for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {"lm_head", "model.layers.1.mlp.down_proj"}
    layers = [module for module in quantized.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 13
    assert all((layer.activation is None) == isinstance(settings, Dynamic) for layer in layers)
    logits = quantized(**inputs).logits
    assert logits.dtype == quantized.dtype == dtype
    error = (logits.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.06


def test_alphas_by_name_change_the_layers_that_they_name(model, tokenizer):
    settings = SmoothQuant(alphas={r".*layers\.0\.self_attn": 0.9}, **SMALL)
    recipe = Recipe("mine", settings)
    same = Recipe("plain", SmoothQuant(**SMALL))
    text = calibration_data(recipe, tokenizer)
    codes = []
    for each in (recipe, same):
        quantized = apply_recipe(each, deepcopy(model), text, torch.float32)
        codes.append({name: m.activation.scale for name, m in quantized.named_modules() if isinstance(m, Int8Linear)})
    changed = {name for name in codes[0] if codes[0][name] != codes[1][name]}
    assert changed == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
