import json

import pytest

from ipex_quant.autotune import Report
from ipex_quant.autotune.trials import Trial, TrialRecord, read_record

IDENTITY = {"seed": 0, "model": "abc"}


def trial(index):
    return Trial(index, {"alpha": index}, f"recipe {index}", 0.5, 0.1, None, True, 1000, 1.0, 0.5, None, 2.0)


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
    "text",
    [
        "",
        "text",
        '{"type": "trial"}\n',
        '{"type": "search"}\n{"type": "trial", "x": 1}\n',
        "[1]",
        "[" * 100000,
        '{"type": []}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "trials.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a record of trials"):
        TrialRecord(path, IDENTITY)


def finished(path):
    record = TrialRecord(path, IDENTITY | {"criterion": "0.01 relative"})
    record.set_baseline(0.6, 1.5)
    record.add(trial(0))
    record.finish(trial(0), {"layer": {"error": 0.5, "type": "q_proj", "dtype": None}})
    return [json.loads(line) for line in path.read_text().splitlines()]


WRONG = [None, True, "x", [], {}, -1, 0.5, float("nan"), float("inf"), 2**70, "\ud800"]
FITS = {
    "baseline": (-1, 0.5, 2**70),
    "baseline_seconds": (0.5, 2**70),
    "best": (),
    "version": (),
    "index": (),
    "recipe": ({},),
    "label": ("x",),
    "metric": (-1, 0.5, 2**70),
    "loss": (-1, 0.5, 2**70),
    "met": (True,),
    "model_bytes": (),
    "bytes_per_weight": (0.5, 2**70),
    "predicted_ms": (None, 0.5, 2**70),
    "measured_ms": (None, 0.5, 2**70),
    "seconds": (0.5, 2**70),
    "layers": ({},),
}


@pytest.mark.parametrize("name", FITS)
def test_values_of_another_type_are_refused(tmp_path, name):
    path = tmp_path / "trials.jsonl"
    lines = finished(path)
    (line,) = (each for each in lines if name in each)
    for value in WRONG:
        line[name] = value
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        if any(type(value) is type(fit) and value == fit for fit in FITS[name]):
            Report.of(path).to_html()
        else:
            with pytest.raises(ValueError, match="is not a record of trials"):
                read_record(path)


@pytest.mark.parametrize("layers", [0, [1], {"a": 1}, {"a": {}}, {"a": {"error": "1"}}, {"a": {"error": 1, "b": []}}])
def test_sensitivities_of_another_type_are_refused(tmp_path, layers):
    path = tmp_path / "trials.jsonl"
    lines = finished(path)
    lines[-1]["layers"] = layers
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(ValueError, match="is not a record of trials"):
        read_record(path)


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
