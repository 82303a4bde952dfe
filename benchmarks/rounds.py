"""Measuring linears: in rounds, with the machine's limits, and with weights that exceed the CPU's caches."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import Limits

ROTATION_BYTES = 320 << 20
BASELINE = "torch bf16 linear"


@dataclass(frozen=True)
class Kernel:
    """A linear under test: `prepare` turns a float weight into its operand, `run` multiplies activations by it.

    `stage` converts bfloat16 activations to the form that `run` takes, outside of the measured time.
    """

    name: str
    prepare: Callable[[torch.Tensor], Any]
    run: Callable[[Any, Any], object]
    nbytes: Callable[[Any], int]
    stage: Callable[[torch.Tensor], Any] = lambda x: x


def torch_bf16() -> Kernel:
    """The baseline that every kernel is compared with."""
    return Kernel(BASELINE, lambda w: w.bfloat16(), torch.nn.functional.linear, lambda w: w.nbytes)


def mean_seconds(call: Callable[[], object], calls: int) -> float:
    """Mean seconds of `calls` calls, one after the other."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class Rotation:
    """Copies of one operand that together exceed the CPU's caches; each call uses the next copy."""

    def __init__(self, kernel: Kernel, weight: torch.Tensor) -> None:
        self.kernel = kernel
        first = kernel.prepare(weight)
        self.nbytes = kernel.nbytes(first)
        copies = min(64, 1 + ROTATION_BYTES // self.nbytes)
        self.operands = [first, *(kernel.prepare(weight) for _ in range(copies - 1))]
        self.next = 0

    def seconds(self, x: object, calls: int) -> float:
        """Mean seconds of `calls` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            self.next = (self.next + 1) % len(self.operands)
            self.kernel.run(x, self.operands[self.next])
        return (time.perf_counter() - start) / calls


def measure(
    kernels: Sequence[Kernel], shape: tuple[int, int], rows: Sequence[int], rounds: int, limits: Limits
) -> list[dict]:
    """One record for each kernel and number of rows; `shape` is the weight's ``[N, K]``.

    A round times each kernel once, with the machine's limits measured right before and after it (the higher counts),
    and ratios are taken within a round, so that a machine whose speed drifts does not distort them. The figures are
    medians over the rounds.
    """
    n, k = shape
    weight = torch.randn(n, k) * 0.02
    rotations = [Rotation(kernel, weight) for kernel in kernels]
    records = []
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        staged = {r.kernel.name: r.kernel.stage(x) for r in rotations}
        calls = {r.kernel.name: call_count(r, staged[r.kernel.name]) for r in rotations}
        samples: dict[str, list[tuple[float, float, float]]] = {r.kernel.name: [] for r in rotations}
        for number in range(rounds + 1):
            before = limits.measure()
            for r in rotations:
                seconds = r.seconds(staged[r.kernel.name], calls[r.kernel.name])
                after = limits.measure()
                bandwidth, peak = map(max, before, after)
                if number > 0:  # the first round warms up: the system may still be moving pages of the new weights
                    samples[r.kernel.name].append((seconds, bandwidth, peak))
                before = after
        baseline = [s[0] for s in samples[BASELINE]]
        for r in rotations:
            seconds = [s[0] for s in samples[r.kernel.name]]
            records.append(
                {
                    "n": n,
                    "k": k,
                    "m": m,
                    "kernel": r.kernel.name,
                    "seconds": statistics.median(seconds),
                    "weight_bytes": r.nbytes,
                    "of_bandwidth": statistics.median(r.nbytes / s / b for s, b, _ in samples[r.kernel.name]),
                    "of_int8_peak": statistics.median(2 * m * n * k / s / p for s, _, p in samples[r.kernel.name]),
                    "over_torch_bf16": statistics.median(b / s for b, s in zip(baseline, seconds, strict=True)),
                }
            )
    return records


def call_count(rotation: Rotation, x: object) -> int:
    """Number of calls that take about 30 ms, at most one per operand."""
    return max(1, min(len(rotation.operands), int(0.03 / max(rotation.seconds(x, 1), 1e-6))))


def print_table(records: list[dict]) -> None:
    """Print a table for each weight shape, with a line for each kernel."""
    shapes = dict.fromkeys((r["n"], r["k"]) for r in records)
    rows = sorted({r["m"] for r in records})
    for n, k in shapes:
        print(f"\nN = {n}, K = {k}: time in ms (share of read bandwidth | share of INT8 peak | over torch bf16 linear)")
        print(f"{'kernel':26s}" + "".join(f"{'M = ' + str(m):>30s}" for m in rows))
        for kernel in dict.fromkeys(r["kernel"] for r in records):
            cells = {r["m"]: r for r in records if (r["n"], r["k"], r["kernel"]) == (n, k, kernel)}
            line = f"{kernel:26s}"
            for m in rows:
                r = cells[m]
                ratios = f"{r['of_bandwidth']:.2f} | {r['of_int8_peak']:.2f} | {r['over_torch_bf16']:.1f}x"
                line += f"{r['seconds'] * 1e3:>8.3f} ({ratios})".rjust(30)
            print(line)


def write_json(path: Path, results: dict) -> None:
    """Write a JSON file atomically, so that an interrupted run leaves no partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def merge_json(path: Path, machine: dict, name: str, records: list[dict], keys: Sequence[str]) -> None:
    """Write `records` under `name`, in the place of those that the file has with the same values of `keys`."""
    old = json.loads(path.read_text())[name] if path.exists() else []
    merged = {tuple(r[key] for key in keys): r for r in (*old, *records)}
    write_json(path, {"machine": machine, name: list(merged.values())})
