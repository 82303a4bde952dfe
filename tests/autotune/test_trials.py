import json

import pytest

from ipex_quant.autotune.trials import Trial, TrialRecord, read_record

IDENTITY = {"seed": 0, "model": "abc"}


def trial(index):
    return Trial(index, {"alpha": index}, f"recipe {index}", 0.5, 0.1, True, 1000, 1.0, 0.5, None, 2.0)


def test_a_record_is_resumed(tmp_path):
    path = tmp_path / "trials.jsonl"
    record = TrialRecord(path, IDENTITY)
    assert not path.exists()
    record.set_baseline(0.6, 1.5)
    for index in range(3):
        record.add(trial(index))
    assert record.seconds == 7.5

    resumed = TrialRecord(path, IDENTITY)
    assert resumed.baseline == 0.6
    assert resumed.trials == []
    assert resumed.recall({"alpha": 1}) == trial(1)
    assert resumed.recall({"alpha": 7}) is None
    resumed.add(trial(0))
    assert [t.index for t in read_record(path)[2]] == [0, 1, 2], "what is not come to yet is kept"
    for index in (1, 2):
        resumed.add(trial(index))
    resumed.finish(trial(1), {"layer": {"error": 0.5}})
    head, sensitivity, trials = read_record(path)
    assert (head["best"], sensitivity, trials) == (1, {"layer": {"error": 0.5}}, [trial(i) for i in range(3)])
    assert [file.name for file in tmp_path.iterdir()] == ["trials.jsonl"]


def test_a_record_of_another_search_is_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    TrialRecord(path, IDENTITY).set_baseline(1.0, 0.0)
    with pytest.raises(ValueError, match=r"another search: its model is 'abc', not 'xyz'; delete it"):
        TrialRecord(path, IDENTITY | {"model": "xyz"})


@pytest.mark.parametrize(
    "text", ["", "text", '{"type": "trial"}\n', '{"type": "search"}\n{"type": "trial", "x": 1}\n', "[1]"]
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "trials.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a record of trials"):
        TrialRecord(path, IDENTITY)


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = TrialRecord(None, IDENTITY)
    record.set_baseline(1.0, 0.0)
    record.add(trial(0))
    record.finish(trial(0), {})
    assert list(tmp_path.iterdir()) == []


def test_lines_are_json(tmp_path):
    path = tmp_path / "trials.jsonl"
    record = TrialRecord(path, IDENTITY)
    record.set_baseline(1.0, 0.0)
    record.add(trial(0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["search", "trial"]
    assert lines[1]["metric"] == 0.5
