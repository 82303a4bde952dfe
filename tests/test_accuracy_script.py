"""The recipes of benchmarks/accuracy.py are ones, and its caches are measured with and without factors."""

from pathlib import Path

import pytest
import torch

from ipex_quant.llm.cache import layers
from ipex_quant.recipes.recipe import Calibrated


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import accuracy
    import caches

    return accuracy, caches


def test_every_recipe_is_one(scripts, tmp_path, monkeypatch):
    accuracy, _ = scripts
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    for recipes in accuracy.SETS.values():
        for title, settings in recipes.items():
            recipe = accuracy.recipe_of(title, settings, 3, 17)
            assert recipe.description == title
            assert recipe.rotate == ("rotated" in title)
            if isinstance(recipe.settings, Calibrated):
                assert (recipe.settings.samples, recipe.settings.sequence_length) == (3, 17)


def test_factors_are_back_afterwards(scripts):
    _, caches = scripts
    keys = torch.ones(1, 2, 3, 8)
    keys[..., 5] = 100.0
    expected = layers.outlier_factors(keys)
    with caches.without_factors():
        assert torch.equal(layers.outlier_factors(keys), torch.ones(2, 8))
    assert torch.equal(layers.outlier_factors(keys), expected)
    assert expected[0, 5] > 1
