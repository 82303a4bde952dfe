import sys

import pytest

from ipex_quant.autotune.loop import run_trials
from ipex_quant.autotune.recipe import Int8Recipe
from ipex_quant.autotune.trials import Trial, TrialRecord


def search():
    for samples in range(1, 6):
        yield Int8Recipe(0.5, samples)


def measure(recipe, index):
    loss = 5 - recipe.samples
    return Trial(index, recipe.to_json(), str(recipe), 0.0, loss, loss <= 2, 1, 1.0, None, None, 10.0)


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_when_the_search_ends(count):
    record = TrialRecord(None, {})
    trials = run_trials(search(), measure, record, lambda: len(record.trials) == count)
    assert [trial.recipe["samples"] for trial in trials] == list(range(1, min(count, 5) + 1))
    assert [trial.index for trial in trials] == list(range(len(trials)))
    assert record.trials == trials


def test_without_neural_compressor(monkeypatch):
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    monkeypatch.setitem(sys.modules, "neural_compressor.common", None)
    with pytest.raises(ImportError, match=r"pip install ipex_quant\[autotune\]"):
        run_trials(search(), measure, TrialRecord(None, {}), bool)
