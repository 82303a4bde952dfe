"""Write a table of measured speeds in README.md from a result of benchmarks/linear.py or benchmarks/int8.py.

python tools/readme_table.py {linear,int8} benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
OURS = {"linear": "four", "int8": "three"}
"""How many of the first lines are ours, by benchmark."""
SHAPE = (14336, 4096)
ROWS = (1, 4, 8, 128, 512)


def main() -> None:
    """Replace what stands between the two marks in README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=OURS)
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    table = section(json.loads(options.result.read_text(encoding="utf-8")), OURS[options.benchmark])
    mark = f"<!-- measured: {options.benchmark} -->"
    pattern = re.compile(rf"({mark}\n).*?(<!-- end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", text)
    if count != 1:
        parser.error(f"{options.readme}: expected one section between {mark} and <!-- end -->")
    temporary = options.readme.with_suffix(".tmp")
    temporary.write_text(changed, encoding="utf-8")
    os.replace(temporary, options.readme)


def section(result: dict, ours: str) -> str:
    """Markdown of one shape: a line for each kernel, of which the first `ours` are so, a column for each row count."""
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


def _cell(record: dict) -> str:
    share = {1: "of_bandwidth", 512: "of_int8_peak"}.get(record["m"])
    return f"{record['seconds'] * 1e3:.3g}" + (f" ({record[share]:.0%})" if share else "")


if __name__ == "__main__":
    main()
