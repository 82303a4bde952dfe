import sys

import pytest

from ipex_quant.autotune.candidate import Int8Candidate
from ipex_quant.autotune.loop import run_trials
from ipex_quant.autotune.trials import Trial, TrialRecord


def search():
    for samples in range(1, 6):
        yield Int8Candidate(0.5, samples)


def measure(recipe, index):
    loss = 5 - recipe.samples
    return Trial(index, recipe.to_json(), str(recipe), 0.0, loss, None, loss <= 2, 1, 1.0, None, None, 10.0)


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_when_the_search_ends(count):
    record = TrialRecord(None, {})
    trials = run_trials(search(), measure, record, lambda: len(record.trials) == count)
    assert [trial.recipe["samples"] for trial in trials] == list(range(1, min(count, 5) + 1))
    assert [trial.index for trial in trials] == list(range(len(trials)))
    assert record.trials == trials


def test_a_recorded_trial_is_not_measured_again(tmp_path):
    path = tmp_path / "trials.jsonl"
    first = TrialRecord(path, {})
    run_trials(search(), measure, first, lambda: len(first.trials) == 2)
    again, measured = TrialRecord(path, {}), []
    run_trials(search(), lambda *args: measured.append(args) or measure(*args), again, lambda: len(again.trials) == 3)
    assert [(candidate.samples, index) for candidate, index in measured] == [(3, 2)]
    assert again.trials[:2] == first.trials


def test_a_search_sees_the_trial_of_what_it_yielded():
    seen = []

    def one_by_one():
        for samples in (1, 4):
            seen.append((yield Int8Candidate(0.5, samples)))

    run_trials(one_by_one(), measure, TrialRecord(None, {}), lambda: False)
    assert [(trial.index, trial.loss) for trial in seen] == [(0, 4), (1, 1)]


def test_neural_compressor_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    assert len(run_trials(search(), measure, TrialRecord(None, {}), lambda: False)) == 5
