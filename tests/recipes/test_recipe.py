import dataclasses

import pytest

from ipex_quant.quantization import WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ipex_quant.recipes import recipe_names
from ipex_quant.recipes.recipe import GptqSettings, Recipe, load_recipe


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_the_default_for_new_users_is_packaged():
    recipe = load_recipe("w4a8-g128")
    assert recipe.weight_dtype == WoqWeightDtype.INT4
    assert recipe.weight_qscheme == WoqWeightQScheme.SYMMETRIC
    assert recipe.group_size == 128
    assert recipe.lowp_mode == WoqLowpMode.INT8
    assert recipe.act_quant_mode == WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
    assert recipe.algorithm == "rtn"


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")


def test_a_file_of_the_users_own_loads(written):
    path = written(
        "weight_dtype: int8\nalgorithm: gptq\nskip: [lm_head, 'layers\\.0\\.']\ngptq: {samples: 3, percdamp: 1}\n"
    )
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.skip == ("lm_head", r"layers\.0\.")
    assert recipe.gptq == GptqSettings(samples=3, percdamp=1)
    assert dataclasses.replace(recipe, gptq=GptqSettings(), skip=()) == Recipe(
        name="mine", weight_dtype=WoqWeightDtype.INT8, algorithm="gptq"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: blue", "recipe mine: unknown key 'colour', expected some of description, algorithm"),
        ("gptq: {damp: 1}", "recipe mine: gptq: unknown key 'damp', expected some of act_order"),
        ("weight_dtype: int5", "recipe mine: weight_dtype: expected one of int8, int4, nf4, fp8, got 'int5'"),
        ("weight_dtype: 2", "recipe mine: weight_dtype: expected one of int8, int4, nf4, fp8, got 2"),
        ("lowp_mode: bf17", "recipe mine: lowp_mode: expected one of none, fp16, bf16, int8, got 'bf17'"),
        ("group_size: 48", "recipe mine: .*48"),
        ("group_size: many", "recipe mine: group_size: expected int, got 'many'"),
        ("group_size: true", "recipe mine: group_size: expected int, got True"),
        ("algorithm: awq", "recipe mine: algorithm: expected one of rtn, gptq, got 'awq'"),
        (
            "{algorithm: gptq, weight_dtype: nf4}",
            "recipe mine: weight_dtype: gptq writes int4 or int8",
        ),
        ("{weight_dtype: nf4, weight_qscheme: asymmetric}", "recipe mine: .*symmetric"),
        ("gptq: {samples: 0}", "recipe mine: gptq: samples: expected at least 1, got 0"),
        ("gptq: {act_order: 1}", "recipe mine: gptq: act_order: expected bool, got 1"),
        ("gptq: 3", "recipe mine: gptq: expected keys and values, got int"),
        ("skip: lm_head", "recipe mine: skip: expected a list of strings, got 'lm_head'"),
        ("- 1", "recipe mine: expected keys and values, got list"),
        ("a: [", "recipe mine: while parsing"),
        ("", "recipe mine: expected keys and values, got NoneType"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(written, text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_recipe(written(text))


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"expected a file or one of .*w4a8-g128.*, got 'w4'"):
        load_recipe("w4")
