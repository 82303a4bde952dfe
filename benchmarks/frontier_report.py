"""The tables of frontier.py, and what is on its frontier."""

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


def parts(records: Sequence[Record]) -> list[tuple[str, str, list[Record]]]:
    """Title, size and records of each way to count the bytes of one model.

    Linear layers are compared where embedding and head are in float, whole models with all.
    """
    measured = [record for record in records if "error" not in record]
    linears = [record for record in measured if record["tables_in_float"]]
    found = [
        ("linear layers alone, embedding and head in float", "linear_bytes_per_weight", linears),
        ("the whole model", "bytes_per_weight", measured),
    ]
    return [(title, size, part) for title, size, part in found if part]


def print_table(records: Sequence[Record]) -> None:
    """Print the records of one model by size; a star marks what no other one beats at its size or below."""
    for title, size, part in parts(records):
        print(f"\n{part[0]['model']}, {title}; perplexity of the float model {part[0]['reference_perplexity']:.3f}")
        print(f"  {'':58s}{'bits':>7s}{'MB':>9s}{'KL':>10s}{'99 %':>9s}{'top-1':>8s}{'perplexity':>12s}{'seconds':>9s}")
        for r in sorted(part, key=lambda r: (r[size], r["kl"])):
            star = " " if is_beaten(r, part, size) else "*"
            numbers = f"{8 * r[size]:>7.2f}{r['megabytes']:>9.2f}{r['kl']:>10.5f}{r['kl_99th_percentile']:>9.4f}"
            rest = f"{r['top1_agreement']:>8.2%}{r['perplexity']:>12.3f}{r['seconds']:>9.1f}"
            print(f"{star} {r['producer'] + ': ' + r['name']:58s}{numbers}{rest}")
    for r in records:
        if "error" in r:
            print(f"  {r['producer'] + ': ' + r['name']:58s} failed: {r['error']}")


def print_comparison(records: Sequence[Record], ours: str) -> None:
    """Print, for the frontier of the peers of one model, the best of `ours` in at most as many bytes."""
    for title, size, part in parts(records):
        own = [record for record in part if record["producer"] == ours]
        print(f"\n{part[0]['model']}, {title}: the peers' frontier, and what {ours} has in at most as many bytes")
        for peer in frontier([record for record in part if record["producer"] != ours], size):
            best = min((r for r in own if r[size] <= peer[size]), key=lambda r: r["kl"], default=None)
            name = f"{8 * peer[size]:6.2f} bits  {peer['producer'] + ': ' + peer['name']:44s}{peer['kl']:>9.5f}"
            if best is None:
                print(f"{name}   nothing as small")
                continue
            ratio = best["kl"] / peer["kl"]
            print(
                f"{name}   {8 * best[size]:6.2f} bits {best['name']:26s}{best['kl']:>9.5f}   {ratio:.2f} times the KL"
            )


def markdown(records: Sequence[Record]) -> str:
    """Tables of the linear layers of each model: the frontier of each producer, in bold what no producer beats."""
    lines = []
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        _, size, linears = parts(own)[0]
        producers = dict.fromkeys(record["producer"] for record in linears)
        best = [r for name in producers for r in frontier([r for r in linears if r["producer"] == name], size)]
        first = linears[0]
        lines += [
            f"`{model}`, {first['tokens']} tokens of {first['texts']}; perplexity in float "
            f"{first['reference_perplexity']:.2f}:",
            "",
            "| bits a weight | quantizer | KL | of 99 % of the tokens at most | top-1 agreement | perplexity |",
            "|--:|---|--:|--:|--:|--:|",
        ]
        for r in sorted(best, key=lambda r: (r[size], r["kl"])):
            name = f"{r['producer']}: {r['name']}"
            name = name if is_beaten(r, linears, size) else f"**{name}**"
            lines.append(
                f"| {8 * r[size]:.2f} | {name} | {r['kl']:.3g} | {r['kl_99th_percentile']:.2g} | "
                f"{r['top1_agreement']:.1%} | {r['perplexity']:.2f} |"
            )
        lines.append("")
        failed = [f"{r['producer']}: {r['name']} ({r['error']})" for r in own if "error" in r]
        lines += [f"Failed: {'; '.join(failed)}.", ""] if failed else []
    return "\n".join(lines).rstrip()
