import json
import tempfile
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant import data
from ipex_quant.llm.saved.notes import recipe_note
from ipex_quant.nn import Int8Linear
from ipex_quant.nn.linears import is_linear
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.recipes.apply import apply_recipe, calibration_data
from ipex_quant.recipes.recipe import Calibrated, Dynamic, Gptq, Recipe, SmoothQuant, Static, load_recipe

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


@pytest.fixture
def no_files(monkeypatch):
    """Nothing goes through a file on its way."""

    def fail(*args, **kwargs):
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    monkeypatch.setattr(tempfile, "mkstemp", fail)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptqs_weights_are_those_of_the_directory_that_it_writes(model, tokenizer, tmp_path, act_order, no_files):
    loaded = load_recipe("w4a8-gptq-g128")
    recipe = replace(loaded, settings=replace(loaded.settings, **SMALL, act_order=act_order))
    calibration = calibration_data(recipe, tokenizer)
    mapping, float_model = recipe.qconfig_mapping(model), deepcopy(model)
    quantized = apply_recipe(recipe, model, calibration)
    options = {"nsamples": 8, "pad_max_length": 64, "group_size": 32, "act_order": act_order, "static_groups": True}
    directory = ipex.quantization.gptq(float_model, calibration, **options, save_dir=tmp_path / "gptq")
    checkpoint = ipex.llm.utils.load_low_precision_checkpoint(directory)
    expected = ipex.llm.optimize(
        float_model, dtype=torch.bfloat16, quantization_config=mapping, low_precision_checkpoint=checkpoint
    )
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")]
    for name in names:
        found, other = (each.get_submodule(name).quantized_weight() for each in (quantized, expected))
        assert found.scheme == other.scheme == WeightScheme(WoqWeightDtype.INT4, False, 32)
        assert torch.equal(found.codes, other.codes)
        assert torch.equal(found.scales, other.scales)
        assert torch.equal(found.zero_points, other.zero_points)
        assert (found.g_idx is None) == (other.g_idx is None)
        assert found.g_idx is None or torch.equal(found.g_idx, other.g_idx)


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
    linears = {name for name, module in quantized.named_modules() if is_linear(module)}
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


@pytest.mark.parametrize("name", ["w4a8-g128", "w4a8-gptq-g128", "w4a8-awq-g128"])
def test_four_bits_are_kept_from_the_output_layer_and_have_groups_by_width(model, tokenizer, name):
    recipe = load_recipe(name)
    if isinstance(recipe.settings, Calibrated):
        recipe = replace(recipe, settings=replace(recipe.settings, **SMALL))
    quantized = apply_recipe(recipe, model, calibration_data(recipe, tokenizer))
    schemes = {n: m.quantized_weight().scheme for n, m in quantized.named_modules() if hasattr(m, "quantized_weight")}
    assert len(schemes) == 16
    assert schemes.pop("lm_head") == schemes.pop("model.embed_tokens") == WeightScheme(WoqWeightDtype.INT8, True, -1)
    assert set(schemes.values()) == {WeightScheme(WoqWeightDtype.INT4, False, 32)}
    assert recipe_note(quantized) == recipe.note


def test_what_is_skipped_stays_in_float_whatever_its_place(model):
    recipe = replace(load_recipe("w4a8-g128"), skip=("lm_head", r".*layers\.1\."))
    quantized = apply_recipe(recipe, model)
    linears = {name for name, module in quantized.named_modules() if is_linear(module)}
    assert len(linears) == 8
    assert "lm_head" in linears


def test_a_saved_model_knows_the_recipe_and_explains_it(model, tmp_path, capsys):
    quantized = apply_recipe(load_recipe("w4a8-g128"), model)
    ipex.llm.save(quantized, tmp_path / "saved")
    ipex.explain(ipex.llm.load(tmp_path / "saved"))
    assert capsys.readouterr().out.splitlines()[-1] == f"recipe {load_recipe('w4a8-g128').note}"
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for wrong in (3, "two\nlines", "x" * 501):
        config["quantization_config"]["recipe"] = wrong
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"quantization_config\.recipe: expected null or at most 500 characters"):
            ipex.llm.load(tmp_path / "saved")
