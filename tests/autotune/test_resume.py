import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ipex_quant.autotune.trials import read_record

WORKER = Path(__file__).parent / "resume_worker.py"


def tune(record, summary, deadly=0):
    return subprocess.run(
        [sys.executable, WORKER, record, summary, str(deadly)], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = tune(folder / "trials.jsonl", folder / "summary.json")
    assert result.returncode == 0, result.stderr
    return folder, int(result.stdout)


def outcome(record):
    head, sensitivity, trials = read_record(record)
    del head["baseline_seconds"]
    return head, sensitivity, [(t.recipe, t.metric, t.loss, t.met, t.model_bytes) for t in trials]


def test_killed_in_the_middle_it_goes_on_to_the_same_result(undisturbed, tmp_path):
    folder, evaluations = undisturbed
    assert evaluations >= 6
    deadly = evaluations - 2
    killed = tune(tmp_path / "trials.jsonl", tmp_path / "summary.json", deadly)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    assert len(read_record(tmp_path / "trials.jsonl")[2]) == deadly - 2
    resumed = tune(tmp_path / "trials.jsonl", tmp_path / "summary.json")
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) == evaluations - (deadly - 1), "finished trials are not measured again"
    assert outcome(tmp_path / "trials.jsonl") == outcome(folder / "trials.jsonl")
    assert (tmp_path / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"trials.jsonl", "summary.json"}
