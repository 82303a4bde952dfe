import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "measured_table.py"


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


def run(result, page, benchmark="int8", *options):
    command = [sys.executable, SCRIPT, benchmark, result, "--page", page, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_section_of_the_page_is_replaced(result, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: int8 -->\nold\n<!-- end -->\nafter\n")
    assert run(result, page).returncode == 0
    assert run(result, page).returncode == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- measured: int8 -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "2 threads of A Fast One" in text
    assert "The first three lines are ours" in text
    assert text.count("| 1 (90%) | 4 | 8 | 128 | 512 (80%) |") == 2


def test_every_level_has_a_column(tmp_path):
    records = [
        {"level": level, "kernel": "INT4", "phase": phase, "bound": bound, "share": share}
        for level, share in (("avx2", 0.5), ("avx512_vnni", 0.75))
        for phase, bound in (("prefill", "INT8"), ("decode", "read bandwidth"))
        if (level, phase) != ("avx2", "prefill")
    ]
    result = {"machine": {"threads": 2, "cpu": "A Fast One"}, "levels": records}
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: levels -->\n<!-- end -->\n")
    assert run(tmp_path / "result.json", page, "levels").returncode == 0
    lines = page.read_text().splitlines()[3:-1]
    assert lines[0] == "| kernel | `avx2` | `avx512_vnni` |"
    assert lines[2:] == ["| decode: INT4 | 0.50 | 0.75 |", "| prefill: INT4 |  | 0.75 INT8 |"]


def test_the_frontier_of_every_producer_is_shown(tmp_path):
    common = {"model": "tiny", "tables_in_float": True, "tokens": 9, "texts": "a text", "reference_perplexity": 12.5}
    measures = {"kl_99th_percentile": 0.5, "top1_agreement": 0.75, "perplexity": 13.0, "bytes_per_weight": 1}
    points = [("a", "best", 0.5, 0.1), ("b", "own best", 0.5, 0.2), ("b", "large", 0.625, 0.3), ("a", "more", 1, 0.01)]
    keys = ("producer", "name", "linear_bytes_per_weight", "kl")
    records = [{**common, **measures, **dict(zip(keys, point, strict=True))} for point in points]
    records.append({"model": "tiny", "producer": "c", "name": "none", "error": "out of memory"})
    (tmp_path / "result.json").write_text(json.dumps({"machine": {}, "frontier": records}))
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: frontier -->\n<!-- end -->\n")
    done = run(tmp_path / "result.json", page, "frontier")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[:3] for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert rows == [
        ["| 4.00", "**a: best**", "0.1"],
        ["| 4.00", "b: own best", "0.2"],
        ["| 8.00", "**a: more**", "0.01"],
    ]
    assert "9 tokens of a text; perplexity in float 12.50" in page.read_text()
    assert "Failed: c: none (out of memory)." in page.read_text()


def test_a_page_without_the_marks_is_left_alone(result, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    failed = run(result, page)
    assert failed.returncode == 2
    assert "expected one section" in failed.stderr
    assert page.read_text() == "nothing"


@pytest.mark.parametrize("benchmark", ["peers", "generate"])
def test_generation_is_compared_by_engine(benchmark, tmp_path):
    common = {"shape": "llama-1.1b", "prompt": 512, "new_tokens": 64, "beams": 1}
    speed = {"prefill_tokens_per_second": 200.04, "decode_tokens_per_second": 30.25, "weight_bytes": 7e8}
    ratios = {"prefill_first_over_this": 1.5, "decode_first_over_this": 2, "peak_bytes": 1.5e9}
    shares = {"prefill_outside_gemm": 0.125, "decode_outside_gemm": 0.25}
    records = [
        {**common, "engine": "ours, INT4", **speed, **ratios, **shares},
        {**common, "engine": "theirs", "error": "not installed: no | compiler"},
        {**common, "engine": "a search", "beams": 4, "total_tokens_per_second": 9, "total_first_over_this": 2.5},
    ]
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    result.write_text(json.dumps({"machine": {"threads": 2, "cpu": "A Fast One"}, "generate": records}))
    page.write_text(f"<!-- measured: {benchmark} -->\n<!-- end -->\n")
    assert run(result, page, benchmark).returncode == 0
    lines = page.read_text().splitlines()
    measured = "| 12% | 25% " if benchmark == "generate" else ""
    assert f"| ours, INT4 | 200 (1.50x) | 30.2 (2.00x) {measured}| 0.70 | 1.50 |" in lines
    failed = next(line for line in lines if line.startswith("| theirs"))
    assert failed.startswith("| theirs | failed: not installed: no / compiler |")
    assert {line.count("|") for line in lines if line.startswith("|")} == {8 if benchmark == "generate" else 6}
    assert "how many times as fast ours, INT4 was" in page.read_text()
    assert "With 4 beams and 64 new tokens: a search, 9 token/s" in page.read_text()
    assert run(result, page, benchmark, "--shapes", "llama-1.1b").returncode == 0
    assert page.read_text().splitlines() == lines
    assert "expected some of ['llama-1.1b']" in run(result, page, benchmark, "--shapes", "llama-8b").stderr


def test_checkpoints_have_columns_for_loading(tmp_path):
    sizes = {"loading_peak_bytes": 9e8, "answer_peak_bytes": 9.5e8, "weight_bytes": 7e8, "peak_bytes": 1.5e9}
    speed = {"loading_seconds": 0.75, "answer_seconds": 1, "prefill_tokens_per_second": 200}
    speed["decode_tokens_per_second"] = 30
    ratios = {f"{phase}_first_over_this": 1 for phase in ("loading", "answer", "prefill", "decode")}
    task = {"shape": "tiny, GPTQ", "engine": "ours", "prompt": 64, "new_tokens": 8, "beams": 1}
    records = [{**task, **speed, **ratios, **sizes}]
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    result.write_text(json.dumps({"machine": {"threads": 2, "cpu": "A Fast One"}, "generate": records}))
    page.write_text("<!-- measured: checkpoints -->\n<!-- end -->\n")
    assert run(result, page, "checkpoints").returncode == 0
    assert (
        "| ours | 0.75 (1.00x) | 0.90 | 1 (1.00x) | 0.95 | 200 (1.00x) | 30 (1.00x) | 0.70 | 1.50 |" in page.read_text()
    )


def test_serving_has_a_column_for_each_task(tmp_path):
    def record(engine, task, rate, ratio):
        return {"shape": "tiny", "engine": engine, "task": task, "tokens_per_second": rate, "first_over_this": ratio}

    records = [
        *(record("ours", task, rate, 1.0) for task, rate in (("decode 1", 50), ("decode 8", 234.4))),
        *(record("theirs", task, rate, 2.0) for task, rate in (("decode 1", 25), ("decode 8", 60))),
        {"shape": "tiny", "engine": "another", "task": "decode 1", "error": "not installed: a | b"},
        {"shape": "tiny", "engine": "ours", "task": "stall", "longest_pause": 0.5},
    ]
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    result.write_text(json.dumps({"machine": {"threads": 2, "cpu": "A Fast One"}, "serving": records}))
    page.write_text("<!-- measured: serving -->\n<!-- end -->\n")
    assert run(result, page, "serving").returncode == 0
    lines = page.read_text().splitlines()
    assert lines[3:] == [
        "| engine | decode 1 | decode 8 |",
        "|---|--:|--:|",
        "| ours | 50 (1.00x) | 234 (1.00x) |",
        "| theirs | 25 (2.00x) | 60 (2.00x) |",
        "| another | failed: not installed: a / b |",
        "<!-- end -->",
    ]


def test_the_shapes_that_are_asked_for(tmp_path):
    common = {"prompt": 512, "new_tokens": 64, "beams": 1, "engine": "ours", "error": "none"}
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    records = [{**common, "shape": shape} for shape in ("one", "two")]
    result.write_text(json.dumps({"machine": {"threads": 2, "cpu": "A Fast One"}, "generate": records}))
    page.write_text("<!-- measured: peers -->\n<!-- end -->\n")
    assert run(result, page, "peers").returncode == 0
    assert all(f"`{shape}`, 512" in page.read_text() for shape in ("one", "two"))
    assert run(result, page, "peers", "--shapes", "two").returncode == 0
    assert "`one`" not in page.read_text()
    assert "`two`, 512" in page.read_text()


@pytest.mark.parametrize(
    ("page", "benchmark", "file", "shapes"),
    [
        ("docs/benchmarks.md", "linear", "linear-epyc-zen4", ()),
        ("docs/benchmarks.md", "int8", "int8-epyc-zen4", ()),
        ("docs/benchmarks.md", "generate", "generate-epyc-zen4", ("llama-1.1b",)),
        ("docs/benchmarks.md", "peers", "peers-epyc-zen4", ()),
        ("README.md", "peers", "peers-epyc-zen4", ("llama-1.1b",)),
    ],
)
def test_the_pages_show_the_results(page, benchmark, file, shapes, tmp_path):
    text = (ROOT / page).read_text()
    copy = tmp_path / "page.md"
    copy.write_text(text)
    options = ("--shapes", *shapes) if shapes else ()
    written = run(ROOT / "benchmarks" / "results" / f"{file}.json", copy, benchmark, *options)
    assert written.returncode == 0, written.stderr
    assert copy.read_text() == text
