"""Write a table of measured speeds in docs/benchmarks.md from a result of the script of that name in benchmarks/.

python tools/measured_table.py BENCHMARK benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
FRONTIER, LEVELS, SERVING = "frontier", "levels", "serving"
OURS = {"linear": "four", "int8": "three"}
"""Number of the first lines that are kernels of this package, by benchmark."""
SHAPE = (14336, 4096)
ROWS = (1, 4, 8, 128, 512)
GENERATION = {
    "generate": {
        "prefill token/s": ("prefill_tokens_per_second", "prefill_first_over_this"),
        "decode token/s": ("decode_tokens_per_second", "decode_first_over_this"),
        "prefill outside GEMMs": "prefill_outside_gemm",
        "decode outside GEMMs": "decode_outside_gemm",
        "weights": "weight_bytes",
        "peak": "peak_bytes",
    },
    "peers": {
        "prefill token/s": ("prefill_tokens_per_second", "prefill_first_over_this"),
        "decode token/s": ("decode_tokens_per_second", "decode_first_over_this"),
        "weights": "weight_bytes",
        "peak": "peak_bytes",
    },
    "checkpoints": {
        "loading s": ("loading_seconds", "loading_first_over_this"),
        "peak": "loading_peak_bytes",
        "first token s": ("answer_seconds", "answer_first_over_this"),
        "peak then": "answer_peak_bytes",
        "prefill token/s": ("prefill_tokens_per_second", "prefill_first_over_this"),
        "decode token/s": ("decode_tokens_per_second", "decode_first_over_this"),
        "weights": "weight_bytes",
        "peak at last": "peak_bytes",
    },
}
"""Columns by benchmark, with the keys of a record that they show; a pair is a value and a ratio."""


def main() -> None:
    """Replace the text between the two marks in the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=[*OURS, *GENERATION, FRONTIER, LEVELS, SERVING])
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--shapes", nargs="+", help="of generate, peers and checkpoints: those to show; all, if not given"
    )
    parser.add_argument("--machine", help="part of the mark, where a page has several tables of a benchmark")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown file with the marks")
    options = parser.parse_args()
    text = options.page.read_text(encoding="utf-8")
    result = json.loads(options.result.read_text(encoding="utf-8"))
    if options.benchmark in OURS:
        table = section(result, OURS[options.benchmark])
    elif options.benchmark == FRONTIER:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from frontier_report import markdown

        table = markdown(result["frontier"])
    elif options.benchmark == LEVELS:
        table = levels_section(result)
    elif options.benchmark == SERVING:
        table = serving_section(result)
    else:
        measured = {r["shape"] for r in result["generate"]}
        if not measured.issuperset(options.shapes or ()):
            parser.error(f"--shapes: expected some of {sorted(measured)}, got {options.shapes}")
        result["generate"] = [r for r in result["generate"] if r["shape"] in (options.shapes or measured)]
        table = generation_section(result, GENERATION[options.benchmark])
    mark = f"<!-- measured: {' '.join(filter(None, (options.benchmark, options.machine)))} -->"
    pattern = re.compile(rf"({mark}\n).*?(<!-- end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", text)
    if count != 1:
        parser.error(f"{options.page}: expected one section between {mark} and <!-- end -->")
    temporary = options.page.with_suffix(".tmp")
    temporary.write_text(changed, encoding="utf-8")
    os.replace(temporary, options.page)


def section(result: dict, ours: str) -> str:
    """Markdown of one shape: a line for each kernel, a column for each M; the first `ours` lines are this package's."""
    machine, (n, k) = result["machine"], SHAPE
    records = {(r["kernel"], r["m"]): r for r in result["linear"] if (r["n"], r["k"]) == SHAPE}
    kernels = list(dict.fromkeys(kernel for kernel, _ in records))
    lines = [
        f"Milliseconds for a linear layer of {k} inputs and {n} outputs and M rows of bfloat16 activations, "
        f"on {machine['threads']} threads of {machine['cpu']}. In brackets: for M = 1 the share of the memory's read "
        "bandwidth, for M = 512 that of the INT8 peak, both measured in the same run. The first "
        f"{ours} lines are ours.",
        "",
        "| kernel | " + " | ".join(f"M = {m}" for m in ROWS) + " |",
        "|---" + "|--:" * len(ROWS) + "|",
        *(f"| {kernel} | " + " | ".join(_cell(records[kernel, m]) for m in ROWS) + " |" for kernel in kernels),
    ]
    return "\n".join(lines)


def generation_section(result: dict, columns: dict[str, str | tuple[str, str]]) -> str:
    """Markdown of every shape: a line for each engine, or the reason why it failed, and a sentence on beams."""
    machine, lines = result["machine"], []
    for shape in dict.fromkeys(r["shape"] for r in result["generate"]):
        records = [r for r in result["generate"] if r["shape"] == shape]
        greedy, beams = ([r for r in records if (r["beams"] > 1) == several] for several in (False, True))
        first = greedy[0]
        lines += [
            f"`{shape}`, {first['prompt']} tokens of prompt and {first['new_tokens']} new ones, on "
            f"{machine['threads']} threads of {machine['cpu']}. In brackets: how many times as fast {first['engine']} "
            "was in the same rounds. Memory in GB: of the weights, and the most of loading and generating.",
            "",
            "| engine | " + " | ".join(columns) + " |",
            "|---" + "|--:" * len(columns) + "|",
            *(_generation_line(record, columns) for record in greedy),
            "",
            *(
                f"With {r['beams']} beams and {r['new_tokens']} new tokens: {r['engine']}, "
                f"{r['total_tokens_per_second']:.3g} token/s, prompt included ({r['total_first_over_this']:.2f}x).\n"
                for r in beams
                if "error" not in r
            ),
        ]
    return "\n".join(lines).rstrip()


def levels_section(result: dict) -> str:
    """Markdown: a line for each kernel, a column for each instruction set level."""
    machine, records = result["machine"], result["levels"]
    levels = list(dict.fromkeys(r["level"] for r in records))
    cells = {(r["phase"], r["kernel"], r["level"]): r for r in records}
    kernels = dict.fromkeys((r["phase"], r["kernel"]) for r in records)
    lines = [
        f"Shares of limits, on {machine['threads']} threads of {machine['cpu']}: of the read bandwidth in decoding, in "
        "prefill of the rate of the level's own multiplications, on what stands behind the number.",
        "",
        "| kernel | " + " | ".join(f"`{level}`" for level in levels) + " |",
        "|---" + "|--:" * len(levels) + "|",
        *(
            f"| {phase}: {kernel} | " + " | ".join(_share(cells.get((phase, kernel, each))) for each in levels) + " |"
            for phase, kernel in sorted(kernels)
        ),
    ]
    return "\n".join(lines)


def _share(record: dict | None) -> str:
    if record is None:
        return ""
    return f"{record['share']:.2f}" + (f" {record['bound']}" if record["phase"] == "prefill" else "")


def serving_section(result: dict) -> str:
    """Markdown: a line for each engine, a column for each task that several engines run."""
    machine, records = result["machine"], [r for r in result["serving"] if "tokens_per_second" in r]
    cells = {(r["engine"], r["task"]): r for r in records}
    engines, tasks = (list(dict.fromkeys(r[key] for r in records)) for key in ("engine", "task"))
    failed = {r["engine"]: r["error"] for r in result["serving"] if "error" in r}
    lines = [
        f"Tokens a second of `{records[0]['shape']}` on {machine['threads']} threads of {machine['cpu']}. In brackets: "
        f"how many times as fast {engines[0]} was in the same rounds.",
        "",
        "| engine | " + " | ".join(tasks) + " |",
        "|---" + "|--:" * len(tasks) + "|",
        *(
            f"| {engine} | " + " | ".join(_rate(cells.get((engine, task))) for task in tasks) + " |"
            for engine in engines
        ),
        *(f"| {engine} | failed: {error.replace('|', '/')} |" for engine, error in failed.items()),
    ]
    return "\n".join(lines)


def _rate(record: dict | None) -> str:
    return "" if record is None else f"{record['tokens_per_second']:.3g} ({record['first_over_this']:.2f}x)"


def _generation_line(record: dict, columns: dict[str, str | tuple[str, str]]) -> str:
    if "error" in record:
        return f"| {record['engine']} | failed: {record['error'].replace('|', '/')} |" + " |" * (len(columns) - 1)
    cells = []
    for column in columns.values():
        key = column if isinstance(column, str) else column[0]
        if key.endswith("_bytes"):
            cells.append(f"{record[key] / 1e9:.2f}")
        elif key.endswith("_gemm"):
            cells.append(f"{record[key]:.0%}")
        else:
            cells.append(f"{record[key]:.3g} ({record[column[1]]:.2f}x)")
    return f"| {record['engine']} | " + " | ".join(cells) + " |"


def _cell(record: dict) -> str:
    share = {1: "of_bandwidth", 512: "of_int8_peak"}.get(record["m"])
    return f"{record['seconds'] * 1e3:.3g}" + (f" ({record[share]:.0%})" if share else "")


if __name__ == "__main__":
    main()
