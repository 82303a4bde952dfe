"""The table of frontier.py, and what is on its frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def is_beaten(record: Record, others: Sequence[Record], size: str) -> bool:
    """Whether one of `others` has at most as many bytes, and a lower KL divergence."""
    return any(other[size] <= record[size] and other["kl"] < record["kl"] for other in others)


def frontier(records: Sequence[Record], size: str) -> list[Record]:
    """Those of `records` that no other one beats, by size."""
    return sorted((r for r in records if not is_beaten(r, records, size)), key=lambda r: r[size])


def print_table(records: Sequence[Record]) -> None:
    """Print the records of one model by size: those with embedding and head in float, and all others.

    A star marks what no other one of that part beats at its size or below.
    """
    measured = [record for record in records if "error" not in record]
    for in_float in (True, False):
        size = "linear_bytes_per_weight" if in_float else "bytes_per_weight"
        part = sorted((r for r in measured if r["tables_in_float"] == in_float), key=lambda r: (r[size], r["kl"]))
        if not part:
            continue
        what = "linear layers only, embedding and head in float" if in_float else "the whole model"
        print(f"\n{part[0]['model']}, {what}; perplexity of the float model {part[0]['reference_perplexity']:.3f}")
        print(f"  {'':58s}{'bits':>7s}{'MB':>9s}{'KL':>10s}{'99 %':>9s}{'top-1':>8s}{'perplexity':>12s}{'seconds':>9s}")
        for r in part:
            star = " " if is_beaten(r, part, size) else "*"
            numbers = f"{8 * r[size]:>7.2f}{r['megabytes']:>9.2f}{r['kl']:>10.5f}{r['kl_99th_percentile']:>9.4f}"
            rest = f"{r['top1_agreement']:>8.2%}{r['perplexity']:>12.3f}{r['seconds']:>9.1f}"
            print(f"{star} {r['producer'] + ': ' + r['name']:58s}{numbers}{rest}")
    for r in records:
        if "error" in r:
            print(f"  {r['producer'] + ': ' + r['name']:58s} failed: {r['error']}")
