import pytest

from ipex_quant.autotune.candidate import Int8Candidate, WeightOnlyCandidate
from ipex_quant.autotune.search import (
    Layer,
    best_trial,
    float_sets,
    search_int8,
    search_largest,
    search_weight_only,
)
from ipex_quant.autotune.trials import Trial
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype

BASE = Int8Candidate("auto", 100)


def trial(loss=0.0, met=False, size=1, index=0, recipe=BASE):
    return Trial(index, recipe.to_json(), str(recipe), 1 - loss, loss, None, met, size, 1.0, None, None, 0.0)


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


@pytest.mark.parametrize("guess", [0, 7, 14, "right", "one off"])
@pytest.mark.parametrize("smallest", range(15))
def test_the_smallest_weight_only_size_is_found(smallest, guess):
    recipes = weight_only_recipes(15)
    fine = [recipe for of_one_size in recipes[smallest:] for recipe in of_one_size]
    guess = {"right": smallest, "one off": smallest + 1}.get(guess, guess)
    tried = run(search_weight_only(recipes, lambda: guess, thorough=False), lambda recipe: recipe in fine)
    assert len(set(tried)) == len(tried) <= 8
    assert recipes[smallest][0] in tried
    assert smallest == 0 or recipes[smallest - 1][0] in tried, "a smaller size may do"
    if guess == smallest:
        assert len(tried) <= 2
    thorough = run(search_weight_only(recipes, lambda: guess), lambda recipe: recipe in fine)
    assert thorough[: len(tried)] == tried
    assert set(recipes[smallest]) <= set(thorough)
    assert set(recipes[max(smallest - 1, 0)]) <= set(thorough), "another algorithm may do with less"


def test_another_algorithm_may_do_with_less():
    recipes = weight_only_recipes(8)
    fine = [recipes[6][0], recipes[7][0], *(of_one_size[1] for of_one_size in recipes[3:])]
    tried = run(search_weight_only(recipes, lambda: 6), lambda recipe: recipe in fine)
    assert recipes[3][1] in tried


def test_no_size_is_a_success():
    recipes = weight_only_recipes(4)
    tried = run(search_weight_only(recipes, lambda: 2), lambda recipe: False)
    assert tried == [recipes[2][0], recipes[3][0], recipes[3][1]]


def test_the_largest_size():
    recipes = weight_only_recipes(3)
    assert run(search_largest(recipes), lambda recipe: True) == recipes[2]
    assert run(search_largest(recipes, thorough=False), lambda recipe: True) == recipes[2][:1]
    tried = run(search_largest(recipes, thorough=False), lambda recipe: recipe == recipes[1][1])
    assert tried == [*recipes[2], *recipes[1]], "smaller ones where none is met"
    assert run(search_largest(recipes), lambda recipe: False) == [*recipes[2], *recipes[1], *recipes[0]]


def test_the_best_trial():
    trials = [trial(0.5), trial(0.02, True, 10), trial(0.03, True, 5), trial(0.01, True, 5)]
    assert best_trial(trials, lambda t: t.model_bytes) is trials[3]
    assert best_trial(trials, lambda t: 0) is trials[3]
    assert best_trial([*trials[:1], trial(0.2)], lambda t: 0).loss == 0.2
