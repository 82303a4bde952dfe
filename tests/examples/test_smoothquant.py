import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "smoothquant.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("smoothquant_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quick = {"SAMPLES": 16, "HELD_OUT_TOKENS": 512, "SPEED_SECONDS": 0.001, "SPEED_ROUNDS": 1}
    for name, value in quick.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_the_script_shows_what_smoothing_gains(script, capsys):
    script.main()
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines}
    assert head.split() == ["model", "perplexity", "change", "KL", "top-1", "read", "token/s"]
    assert all(len(values) == 5 and float(values[-1]) > 0 for values in rows.values())
    divergence = {name: float(values[2]) for name, values in rows.items()}
    assert divergence["plain, float32"] == divergence["outliers, float32"] == 0
    assert 0 < divergence["plain, dynamic"] < 0.001
    assert 0 < divergence["outliers, SmoothQuant"] < 0.005
    assert 0 < divergence["the same in bfloat16"] < 0.005
    assert divergence["outliers, static"] > 0.03
