import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.autotune import Report, TuningOptions, tune
from ipex_quant.recipes.apply import apply_recipe
from ipex_quant.recipes.best import BEST_RECIPES
from ipex_quant.recipes.recipe import load_recipe, recipe_yaml
from ipex_quant.recipes.tune import EVERY_SCHEME
from ipex_quant.recipes.tuned import name_patterns, tuned_recipe


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("algorithm", ["gptq", "awq", "auto_round", "rtn"])
def test_a_written_recipe_makes_the_tuned_model_again(tied, algorithm, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=2, vocab_size=128, initializer_range=0.2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(128, (1, 40))} for _ in range(4)]
    space = EVERY_SCHEME.__class__(**{**vars(EVERY_SCHEME), "algorithms": (algorithm,)})
    found, report = tune(model, batches, TuningOptions(quantization_config=space, size=60_000))
    (tmp_path / "found.yaml").write_text(recipe_yaml(tuned_recipe(report, space.act_quant_mode, 4, 40)))
    recipe = load_recipe(tmp_path / "found.yaml")
    assert re.match(
        r"Found by autotune: .* MB in memory, .* tokens a second; loss .*, allowed any\.", recipe.description
    )
    again = apply_recipe(recipe, model, () if algorithm == "rtn" else batches, torch.float32)
    state, expected = again.state_dict(), found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert len({str(module.scheme) for module in again.modules() if hasattr(module, "scheme")}) > 1


def test_a_search_that_has_not_ended_has_no_recipe():
    with pytest.raises(ValueError, match="report: expected one of a weight-only search that has ended"):
        tuned_recipe(Report(0.0, "any", None, [], {}), EVERY_SCHEME.act_quant_mode, 1, 1)


def test_names_that_differ_in_a_number_have_one_pattern():
    names = [*(f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 11)), "lm_head", "h.1.x.2.y", "h.1.x.3.y"]
    patterns = name_patterns(names)
    assert patterns[0] == r"model\.layers\.(0|2|11)\.mlp\.up_proj$"
    others = ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_projx", "xlm_head", "h.1.x.22.y", "h.2.x.2.y"]
    assert [name for name in (*names, *others) if any(re.match(pattern, name) for pattern in patterns)] == names


@pytest.mark.parametrize("bits", sorted(BEST_RECIPES))
def test_the_best_recipe_of_a_number_of_bits_has_that_many(bits):
    recipe = load_recipe(BEST_RECIPES[bits].name)
    assert recipe.settings.weight_dtype.bits == bits
    assert "KL" in BEST_RECIPES[bits].why
