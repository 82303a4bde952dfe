import dataclasses
import re

import pytest
import torch
from torch import nn

from ipex_quant.conversion.qconfig import QuantizationKind, kind_of
from ipex_quant.conversion.rules import choose_qconfigs
from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.observers import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from ipex_quant.quantization import AwqOptions, WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ipex_quant.recipes import recipe_names
from ipex_quant.recipes.recipe import (
    Awq,
    Calibrated,
    Dynamic,
    Gptq,
    Recipe,
    SmoothQuant,
    Static,
    WeightOnly,
    load_recipe,
    recipe_yaml,
)
from ipex_quant.woq.gptq import GptqOptions


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_the_default_for_new_users_is_packaged():
    assert load_recipe("w4a8-g128").settings == WeightOnly(
        weight_dtype=WoqWeightDtype.INT4,
        weight_qscheme=WoqWeightQScheme.ASYMMETRIC,
        group_size=128,
        lowp_mode=WoqLowpMode.INT8,
        act_quant_mode=WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM,
        min_groups=16,
        head_dtype=WoqWeightDtype.INT8,
        embedding_dtype=WoqWeightDtype.INT8,
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("w4a8-g128", "int8"), ("w4a8-gptq-g128", "int8"), ("w4a8-awq-g128", "int8"), ("w8a16", None)]
)
def test_embeddings_are_quantized_where_the_recipe_says_so(name, dtype):
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64)})
    chosen, reasons = choose_qconfigs(load_recipe(name).qconfig_mapping(model), model)
    assert ("embed" in chosen) == (dtype is not None)
    assert not reasons
    if dtype is not None:
        found = chosen["embed"]
        assert (found.weight_dtype.name.lower(), found.group_size) == (dtype, -1)
        skipped = dataclasses.replace(load_recipe(name), skip=("emb",))
        assert "embed" not in choose_qconfigs(skipped.qconfig_mapping(model), model)[0]


@pytest.mark.parametrize(
    ("width", "size"), [(8192, 128), (2048, 128), (1920, 64), (1536, 64), (576, 32), (256, 32), (80, 32), (4160, 64)]
)
def test_groups_fit_the_width_of_a_layer(width, size):
    assert load_recipe("w4a8-g128").settings.group_size_for(width) == size
    assert WeightOnly(group_size=128).group_size_for(width) == 128


def test_a_recipe_knows_what_it_costs_but_not_one_that_was_changed(written):
    recipe = load_recipe("w4a8-g128")
    assert re.fullmatch(
        r"changes the perplexity of SmolLM2\S* from [\d.]+ to [\d.]+ \(KL divergence [\d.e-]+ nats, on \d+ tokens .*\)",
        recipe.cost,
    )
    assert recipe.note == f"w4a8-g128: {recipe.cost}"
    assert dataclasses.replace(recipe, skip=("lm_head",)).cost is None
    own = load_recipe(written("weight_dtype: int8\n"))
    assert (own.cost, own.note) == (None, "mine")


def test_what_needs_no_calibration_has_been_measured():
    unknown = [recipe for recipe in map(load_recipe, recipe_names()) if recipe.cost is None]
    assert all(isinstance(recipe.settings, Calibrated) for recipe in unknown)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("w8a8-smoothquant", SmoothQuant(alpha=0.5, samples=128, sequence_length=512)),
        ("w8a8-static", Static(observer="histogram", samples=128, sequence_length=512)),
        ("w8a8-dynamic", Dynamic()),
    ],
)
def test_recipes_of_quantized_activations_are_packaged(name, settings):
    assert load_recipe(name).settings == settings


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")


def test_a_file_of_the_users_own_loads(written):
    path = written("weight_dtype: int8\nalgorithm: gptq\nskip: [lm_head, 'layers\\.0\\.']\nsamples: 3\npercdamp: 1\n")
    settings = Gptq(weight_dtype=WoqWeightDtype.INT8, samples=3, percdamp=1)
    assert load_recipe(path) == Recipe("mine", settings, skip=("lm_head", r"layers\.0\."))


def test_awq_takes_its_options(written):
    path = written("algorithm: awq\nweight_dtype: nf4\nalpha_steps: 5\nclip_steps: 0\nlowest_clip: 1\ntokens: 7\n")
    settings = load_recipe(path).settings
    assert isinstance(settings, Awq)
    assert settings.options() == AwqOptions(5, 0, 1.0, tokens=7, scale_dtype=torch.float16)


def test_awq_with_gptq(written):
    settings = load_recipe(written("algorithm: awq\nweight_dtype: int4\ngptq: true\n")).settings
    assert settings.options() == AwqOptions(gptq=GptqOptions(scale_dtype=torch.float16), scale_dtype=torch.float16)
    assert settings.options().gptq == Gptq(weight_dtype=WoqWeightDtype.INT4).options()
    with pytest.raises(ValueError, match="recipe mine: weight_dtype: gptq finds integers and codes of tables, got fp8"):
        load_recipe(written("algorithm: awq\nweight_dtype: fp8\ngptq: true\n"))


@pytest.mark.parametrize("algorithm", ["dynamic", "static", "smoothquant"])
def test_layers_that_keep_their_activations(algorithm, written):
    recipe = load_recipe(written(f"algorithm: {algorithm}\nweight_only: ['.*down']\nskip: ['other']\n"))
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "down", "other")})
    chosen, reasons = choose_qconfigs(recipe.qconfig_mapping(model), model)
    assert kind_of(chosen["up"]) is not QuantizationKind.WEIGHT_ONLY
    assert (str(chosen["down"].scheme), chosen["down"].lowp_mode) == ("int8 sym per-channel", WoqLowpMode.BF16)
    assert reasons.keys() == {"other"}
    with pytest.raises(ValueError, match="weight_only: '\\*' is no regular expression"):
        load_recipe(written(f"algorithm: {algorithm}\nweight_only: ['*']\n"))


def test_skip_and_the_first_alpha_that_matches_count(written):
    recipe = load_recipe(
        written("algorithm: smoothquant\nalpha: 0.25\nalphas: {'block.a': 1, 'block': 0.75}\nskip: ['.*skipped']\n")
    )
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "skipped")})
    model = nn.ModuleDict({"block": block, "other": nn.Linear(4, 4)})
    chosen, reasons = choose_qconfigs(recipe.qconfig_mapping(), model)
    alphas = {name: (qconfig.activation().alpha, qconfig.weight().alpha) for name, qconfig in chosen.items()}
    assert alphas == {"block.a": (1, 1), "block.b": (0.75, 0.75), "other": (0.25, 0.25)}
    assert reasons.keys() == {"block.skipped"}


@pytest.mark.parametrize("shared", [True, False])
def test_every_layer_of_a_smoothquant_recipe_shares_or_not(written, shared):
    path = written(f"algorithm: smoothquant\nalphas: {{x: 0.5}}\nshare_weight_observers: {str(shared).lower()}\n")
    mapping = load_recipe(path).qconfig_mapping()
    qconfigs = [mapping.global_qconfig, *mapping.module_name_regex_qconfigs.values()]
    assert [qconfig.share_weight_observers for qconfig in qconfigs] == [shared, shared]


@pytest.mark.parametrize(
    ("name", "observer"),
    [
        ("histogram", HistogramObserver),
        ("min_max", MinMaxObserver),
        ("moving_average", MovingAverageMinMaxObserver),
    ],
)
def test_a_static_recipe_names_its_observer(written, name, observer):
    qconfig = load_recipe(written(f"{{algorithm: static, observer: {name}}}")).qconfig_mapping().global_qconfig
    assert type(qconfig.activation()) is observer


def test_schemes_of_layers_go_first(written):
    path = written(
        "{weight_dtype: int4, group_size: 32, head_dtype: int8, skip: [a.1], "
        "schemes: {a.0: int3 asym g64, lm: int6 sym per-channel, 'a|emb': int5 asym g32}}\n"
    )
    recipe = load_recipe(path)
    assert recipe.settings.schemes["lm"] == WeightScheme(WoqWeightDtype.INT6, True, -1)
    block = nn.ModuleDict({name: nn.Linear(64, 64) for name in "012"})
    model = nn.ModuleDict({"a": block, "lm_head": nn.Linear(64, 9), "emb": nn.Embedding(9, 64), "b": nn.Linear(64, 4)})
    chosen, reasons = choose_qconfigs(recipe.qconfig_mapping(model), model)
    assert {name: str(qconfig.scheme) for name, qconfig in chosen.items()} == {
        "a.0": "int3 asym g64",
        "a.2": "int5 asym g32",
        "lm_head": "int6 sym per-channel",
        "emb": "int5 asym g32",
        "b": "int4 asym g32",
    }
    assert reasons.keys() == {"a.1"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_written_as_it_is_read(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / f"{name}.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / f"{name}.yaml") == recipe


def test_schemes_and_rotations_are_written(tmp_path):
    scheme = WeightScheme(WoqWeightDtype.INT8, True, -1)
    for recipe in (
        Recipe("own", Gptq(schemes={r"a\.(0|1)$": scheme}, samples=3), "Mine: a & b.", (r"c\.d$",)),
        Recipe("own", Dynamic(weight_only=(r".*down",)), "Turned.", rotate=True),
    ):
        (tmp_path / "own.yaml").write_text(recipe_yaml(recipe))
        assert load_recipe(tmp_path / "own.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "colour: blue",
            "recipe mine: unknown key 'colour', rtn takes act_quant_mode, algorithm, .*, embedding_dtype",
        ),
        ("{algorithm: gptq, damp: 1}", "recipe mine: unknown key 'damp', gptq takes act_order"),
        ("samples: 3", "recipe mine: unknown key 'samples', rtn takes"),
        (
            "{algorithm: dynamic, alpha: 1}",
            "recipe mine: unknown key 'alpha', dynamic takes algorithm, desc.*, weight_only$",
        ),
        ("{schemes: {a: int4}}", "recipe mine: schemes: expected a scheme as 'int4 asym g64' .*, got 'int4'"),
        ("{schemes: {a: int9 sym g32}}", "recipe mine: schemes: expected a scheme"),
        ("{schemes: {a: nf4 asym g32}}", "recipe mine: schemes: symmetric: NF4 weights have no zero points"),
        ("{schemes: {a: int4 asym g48}}", "recipe mine: schemes: group_size: .*48"),
        ("{schemes: {'(': int4 asym g32}}", "recipe mine: schemes: .* is no regular expression"),
        ("weight_dtype: int7", "recipe mine: weight_dtype: expected one of int8, int4, nf4, .*, bnb_fp4, got 'int7'"),
        ("weight_dtype: 2", "recipe mine: weight_dtype: expected one of int8, int4, nf4, .*, bnb_fp4, got 2"),
        ("lowp_mode: bf17", "recipe mine: lowp_mode: expected one of none, fp16, bf16, int8, got 'bf17'"),
        ("group_size: 48", "recipe mine: .*48"),
        ("group_size: many", "recipe mine: group_size: expected int, got 'many'"),
        ("group_size: true", "recipe mine: group_size: expected int, got True"),
        (
            "algorithm: qat",
            "recipe mine: algorithm: expected one of rtn, gptq, awq, auto_round, smoothquant, static, dynamic, got "
            "'qat'",
        ),
        ("algorithm: [rtn]", "recipe mine: algorithm: expected one of"),
        (
            "{algorithm: gptq, weight_dtype: fp8}",
            "recipe mine: weight_dtype: gptq finds integers and codes of tables, got fp8",
        ),
        ("{weight_dtype: nf4, weight_qscheme: asymmetric}", "recipe mine: .*symmetric"),
        ("{algorithm: gptq, samples: 0}", "recipe mine: samples: expected at least 1, got 0"),
        ("{algorithm: awq, lowest_clip: 2}", "recipe mine: lowest_clip: expected a fraction of the range"),
        ("{algorithm: awq, tokens: 0}", "recipe mine: tokens: expected at least 1, got 0"),
        ("{algorithm: gptq, act_order: 1}", "recipe mine: act_order: expected bool, got 1"),
        ("{algorithm: static, observer: max}", "recipe mine: observer: expected one of histogram, min_max, mov.*'max'"),
        ("{algorithm: smoothquant, alpha: 1.5}", "recipe mine: alpha: expected a number from 0 to 1, got 1.5"),
        ("{algorithm: smoothquant, alpha: .nan}", "recipe mine: alpha: expected a number from 0 to 1, got nan"),
        ("{algorithm: smoothquant, alpha: auto}", "recipe mine: alpha: expected float, got 'auto'"),
        ("{algorithm: smoothquant, alphas: {a: 2}}", "recipe mine: alphas: expected a number from 0 to 1, got 2"),
        ("{algorithm: smoothquant, alphas: {a(: 1}}", r"recipe mine: alphas: 'a\(' is no regular expression: missing"),
        ("{algorithm: smoothquant, alphas: 1}", "recipe mine: alphas: expected dict, got 1"),
        ("skip: ['*']", r"recipe mine: skip: '\*' is no regular expression: nothing to repeat"),
        ("skip: [1]", "recipe mine: skip: expected str, got 1"),
        ("skip: lm_head", "recipe mine: skip: expected list, got 'lm_head'"),
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
