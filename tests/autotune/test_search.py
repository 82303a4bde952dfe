import pytest

from ipex_quant.autotune.candidate import Int8Candidate, WeightOnlyCandidate
from ipex_quant.autotune.search import Layer, best_trial, float_sets, search_int8, search_weight_only
from ipex_quant.autotune.trials import Trial
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype

BASE = Int8Candidate("auto", 100)


def trial(loss=0.0, met=False, size=1, index=0, recipe=BASE):
    return Trial(index, recipe.to_json(), str(recipe), 1 - loss, loss, met, size, 1.0, None, None, 0.0)


def layers(errors, kind=lambda i: f"type{i}"):
    return [Layer(f"layer{i}", kind(i), error, 100) for i, error in enumerate(errors)]


def run(search, met):
    """The recipes that `search` yields when `met` says which ones meet the criterion."""
    tried = []
    try:
        recipe = next(search)
        while True:
            tried.append(recipe)
            recipe = search.send(trial(0.0 if met(recipe) else 1.0 / len(tried), met(recipe)))
    except StopIteration:
        return tried


def test_the_most_sensitive_layer_is_the_first_to_stay_in_float():
    every = layers([0.1, 0.1, 5.0, 0.2])
    tried = run(search_int8([BASE], lambda recipe: every), lambda recipe: "layer2" in recipe.float_modules)
    assert [recipe.float_modules for recipe in tried] == [(), ("layer2",)]


def test_nothing_stays_in_float_when_all_int8_is_good_enough():
    other = Int8Candidate(None, 100)
    tried = run(search_int8([other, BASE], None), lambda recipe: recipe.alpha is not None)
    assert tried == [other, BASE]


@pytest.mark.parametrize("needed", range(1, 32))
def test_bisection_finds_the_smallest_number_of_layers(needed):
    every = layers([100.0 - i for i in range(32)])
    wanted = {f"layer{i}" for i in range(needed)}
    tried = run(search_int8([BASE], lambda recipe: every), lambda recipe: wanted <= set(recipe.float_modules))
    smallest = min((r for r in tried if wanted <= set(r.float_modules)), key=lambda r: len(r.float_modules))
    assert set(smallest.float_modules) == wanted
    assert len(tried) <= 11
    assert len(set(tried)) == len(tried)


def test_layers_of_a_type_are_tried_together():
    every = layers([1, 9, 2, 8, 3, 7, 4, 6], kind=lambda i: "down" if i % 2 else "up")
    tried = run(
        search_int8([BASE], lambda recipe: every),
        lambda recipe: {"layer1", "layer3", "layer5", "layer7"} <= set(recipe.float_modules),
    )
    assert ("layer1", "layer3", "layer5", "layer7") in [recipe.float_modules for recipe in tried]


def test_some_layer_is_always_left_to_quantize():
    for count in range(1, 9):
        for chosen, _ in float_sets(layers([1.0] * count, kind=lambda i: "same")):
            assert 0 < len(chosen) < count


def test_layers_that_the_user_leaves_in_float_stay_there():
    base = BASE.with_float(["head"])
    tried = run(search_int8([base], lambda recipe: layers([1, 2, 3])), lambda recipe: False)
    assert all("head" in recipe.float_modules for recipe in tried)


def weight_only_recipes(sizes):
    """Two recipes of each size."""
    schemes = [WeightScheme(WoqWeightDtype.INT4, True, 1 << i) for i in range(sizes)]
    return [[WeightOnlyCandidate(a, WoqLowpMode.INT8, (("x", s),)) for a in ("gptq", "rtn")] for s in schemes]


@pytest.mark.parametrize("smallest", range(15))
def test_the_smallest_weight_only_size_is_found(smallest):
    recipes = weight_only_recipes(15)
    fine = [recipe for of_one_size in recipes[smallest:] for recipe in of_one_size]
    tried = run(search_weight_only(recipes), lambda recipe: recipe in fine)
    assert len(set(tried)) == len(tried) <= 12
    assert set(recipes[smallest]) <= set(tried)
    assert set(recipes[max(smallest - 1, 0)]) <= set(tried), "another algorithm may do with less"


def test_another_algorithm_may_do_with_less():
    recipes = weight_only_recipes(8)
    fine = [recipes[6][0], recipes[7][0], *(of_one_size[1] for of_one_size in recipes[3:])]
    tried = run(search_weight_only(recipes), lambda recipe: recipe in fine)
    assert recipes[3][1] in tried


def test_one_size_and_no_success():
    recipes = weight_only_recipes(1)
    assert run(search_weight_only(recipes), lambda recipe: False) == recipes[0]
    assert run(search_weight_only(recipes), lambda recipe: True) == recipes[0]
    recipes = weight_only_recipes(4)
    tried = run(search_weight_only(recipes), lambda recipe: False)
    assert tried == [recipes[0][0], recipes[1][0], recipes[3][0], recipes[3][1]]


def test_the_best_trial():
    trials = [trial(0.5), trial(0.02, True, 10), trial(0.03, True, 5), trial(0.01, True, 5)]
    assert best_trial(trials, lambda t: t.model_bytes) is trials[3]
    assert best_trial(trials, lambda t: 0) is trials[3]
    assert best_trial([*trials[:1], trial(0.2)], lambda t: 0).loss == 0.2
