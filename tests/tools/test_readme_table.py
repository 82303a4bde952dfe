import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "readme_table.py"


@pytest.fixture
def result(tmp_path):
    records = [
        {"n": n, "k": 4096, "m": m, "kernel": kernel, "seconds": m * 1e-3, "of_bandwidth": 0.9, "of_int8_peak": 0.8}
        for n in (14336, 4096)
        for m in (1, 2, 4, 8, 32, 128, 512)
        for kernel in ("ours", "theirs")
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"machine": {"threads": 2, "cpu": "A Fast One"}, "linear": records}))
    return path


def run(result, readme):
    return subprocess.run([sys.executable, SCRIPT, "int8", result, "--readme", readme], capture_output=True, text=True)


def test_the_section_of_the_readme_is_replaced(result, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured: int8 -->\nold\n<!-- end -->\nafter\n")
    assert run(result, readme).returncode == 0
    assert run(result, readme).returncode == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- measured: int8 -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "2 threads of A Fast One" in text
    assert "The first three lines are ours" in text
    assert text.count("| 1 (90%) | 4 | 8 | 128 | 512 (80%) |") == 2


def test_a_readme_without_the_marks_is_left_alone(result, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    failed = run(result, readme)
    assert failed.returncode == 2
    assert "expected one section" in failed.stderr
    assert readme.read_text() == "nothing"


def test_the_readme_has_the_marks():
    text = (ROOT / "README.md").read_text()
    assert [text.count(f"<!-- measured: {name} -->") for name in ("linear", "int8")] == [1, 1]
    assert text.count("<!-- end -->") == 2
