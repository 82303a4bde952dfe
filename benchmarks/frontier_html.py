"""Make one page of a result of frontier.py: charts and tables of size against KL divergence, all quantizers together.

python benchmarks/frontier_html.py benchmarks/results/FILE.json FILE.html
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frontier_candidates import OURS
from frontier_report import Record, frontier, is_beaten, parts

from ipex_quant.autotune.plots import frontier_plot
from ipex_quant.autotune.report import html_page
from ipex_quant.writing import write_whole


def page(records: Sequence[Record]) -> str:
    """The page of all models; without matplotlib it warns and has no charts."""
    found: list[dict[str, Any]] = []
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        for part in parts(own):
            found.append(_part(len(found), *part))
    failed = [record for record in records if "error" in record]
    return html_page(Path(__file__).with_name("frontier.html"), {"parts": found, "failed": failed})


def _part(number: int, title: str, size: str, records: Sequence[Record]) -> dict[str, Any]:
    """One model and way to count bytes, for the template."""
    rows = [
        record | {"bits": 8 * record[size], "front": not is_beaten(record, records, size)}
        for record in sorted(records, key=lambda record: (record[size], record["kl"]))
    ]
    first = records[0]
    return {
        "model": first["model"],
        "title": title,
        "tokens": first["tokens"],
        "texts": first["texts"],
        "reference": first["reference_perplexity"],
        "rows": rows,
        "plot": _plot(f"frontier{number} {first['model']}: {title}", size, records),
    }


def _plot(title: str, size: str, records: Sequence[Record]) -> str:
    names = dict.fromkeys((OURS, *(record["producer"] for record in records)))
    own = {name: [record for record in records if record["producer"] == name] for name in names}
    points, fronts = (
        {name: [(8 * record[size], record["kl"]) for record in choose(each)] for name, each in own.items()}
        for choose in (lambda each: each, lambda each: frontier(each, size))
    )
    try:
        return frontier_plot(title, points, fronts)
    except ImportError as error:
        warnings.warn(f"frontier_html: it has no charts: {error}", stacklevel=4)
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    write_whole(args.page, page(json.loads(args.result.read_text(encoding="utf-8"))["frontier"]))


if __name__ == "__main__":
    main()
