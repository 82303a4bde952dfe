"""What INT8 activations cost the embedded model, plain and with the outliers of large models."""

from dataclasses import replace

import pytest
import torch
from outliers import inject_outliers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_quant import data, evaluation
from ipex_quant.recipes.apply import apply_recipe, calibration_data
from ipex_quant.recipes.recipe import load_recipe

SEQUENCE_LENGTH, HELD_OUT_TOKENS = 256, 4096


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)


def float_model(outliers=False):
    model = AutoModelForCausalLM.from_pretrained(
        data.embedded_model_dir(), local_files_only=True, dtype=torch.float32
    ).eval()
    if outliers:
        inject_outliers(model, lambda: model(**model.dummy_inputs))
    return model


@pytest.fixture(scope="module")
def measure(tokenizer):
    """Compares the embedded model, quantized by a recipe, with its float self on held-out text."""
    reference = float_model()

    def compare(name, outliers, dtype=torch.float32):
        model = float_model(outliers)
        if name is not None:
            recipe = load_recipe(name)
            if name != "w8a8-dynamic":
                recipe = replace(recipe, settings=replace(recipe.settings, samples=32, sequence_length=256))
            model = apply_recipe(recipe, model, calibration_data(recipe, tokenizer), dtype)
        text = data.held_out_text()
        return evaluation.compare(reference, model, tokenizer, text, SEQUENCE_LENGTH, HELD_OUT_TOKENS)

    return compare


def loss(result):
    """Relative increase of the perplexity."""
    return result.perplexity / result.reference_perplexity - 1


def test_outliers_do_not_change_the_float_model(measure):
    result = measure(None, outliers=True)
    assert abs(loss(result)) < 1e-5
    assert result.kl_divergence < 1e-6
    assert result.top1_agreement > 0.999


def test_static_quantization_without_smoothing_suffers_from_outliers(measure):
    result = measure("w8a8-static", outliers=True)
    assert loss(result) > 0.10
    assert result.kl_divergence > 0.05
    assert result.top1_agreement < 0.85


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothquant_stays_close_to_float(measure, outliers, dtype):
    result = measure("w8a8-smoothquant", outliers, dtype)
    assert abs(loss(result)) < 0.02
    assert result.kl_divergence < 0.005
    assert result.top1_agreement > 0.95


def test_dynamic_quantization_stays_close_to_float_without_outliers(measure):
    result = measure("w8a8-dynamic", outliers=False)
    assert abs(loss(result)) < 0.01
    assert result.kl_divergence < 0.001
    assert result.top1_agreement > 0.98
