"""What share of its own limits every kernel reaches at each instruction set level that this CPU has.

A level runs in a process of its own, with IPEX_QUANT_ISA set. What reads weights or caches once is divided by the
bandwidth of reading the same memory and doing nothing with it, what multiplies many rows by the rate of that level's
own instructions for what it computes in; both are measured right before and after the kernel (the higher counts).
Figures are medians over rounds. Decoding reads operands that together exceed the CPU's caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attention
import int8
import torch
from linear import ours
from machine import Limits, describe
from rounds import Kernel, Rotation, call_count, write_json
from tqdm import tqdm

from ipex_quant import ops
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype

SHAPE = (14336, 4096)
"""Of the weight of the linears."""

ROWS = 512
CONTEXT = {"decode": 8192, "prefill": 2048}
BANDWIDTH = "read bandwidth"
_INT, _BF16 = WoqLowpMode.INT8, WoqLowpMode.BF16
LINEARS = {
    "INT4 g128": (WoqWeightDtype.INT4, 128, _INT),
    "INT4 g32": (WoqWeightDtype.INT4, 32, _INT),
    "INT2 g64": (WoqWeightDtype.INT2, 64, _INT),
    "INT8": (WoqWeightDtype.INT8, -1, _INT),
    "IQ4 g64": (WoqWeightDtype.IQ4, 64, _INT),
    "NF4 g128": (WoqWeightDtype.NF4, 128, _INT),
    "INT4 g128, bfloat16 compute": (WoqWeightDtype.INT4, 128, _BF16),
    "NF4 g64, bfloat16 compute": (WoqWeightDtype.NF4, 64, _BF16),
    "BNB_FP4 g64, bfloat16 compute": (WoqWeightDtype.BNB_FP4, 64, _BF16),
    "FP8 g128, bfloat16 compute": (WoqWeightDtype.FP8, 128, _BF16),
}


@dataclass(frozen=True)
class Case:
    """A call to time. `bound` is what limits it, `work` the bytes or operations of a call that count there.

    `run` takes one sample, the seconds of a call; `memory` is what calls read in turn.
    """

    name: str
    phase: str
    bound: str
    work: float
    run: Callable[[], float]
    memory: Sequence[torch.Tensor] = ()


def linear_cases() -> list[Case]:
    """Weight-only and W8A8 linears over one row and over many."""
    kernels = [(ours(name, *settings), settings[2]) for name, settings in LINEARS.items()]
    kernels.append((int8.KERNELS[0], _INT))
    weight = torch.randn(*SHAPE) * 0.02
    found = []
    for kernel, mode in kernels:
        rotation = Rotation(kernel, weight)
        for rows in (1, ROWS):
            x = kernel.stage(torch.randn(rows, SHAPE[1]).bfloat16())
            calls = call_count(rotation, x)
            operations = 2 * rows * SHAPE[0] * SHAPE[1]
            peak = "INT8" if mode == _INT else "bfloat16" if ops.multiplies_bfloat16() else "float32"
            found.append(
                Case(
                    f"linear, {kernel.name}",
                    "decode" if rows == 1 else "prefill",
                    BANDWIDTH if rows == 1 else peak,
                    rotation.nbytes if rows == 1 else operations,
                    partial(rotation.seconds, x, calls),
                    [packed.data for packed in rotation.operands],
                )
            )
    return found


def float_case() -> Case:
    """A float linear over one row."""
    kernel = Kernel("", lambda w: w.bfloat16(), lambda x, w: ops.float_linear(x, w), lambda w: w.nbytes)
    rotation = Rotation(kernel, torch.randn(*SHAPE) * 0.02)
    x = torch.randn(1, SHAPE[1]).bfloat16()
    calls = call_count(rotation, x)
    run = partial(rotation.seconds, x, calls)
    return Case("linear, bfloat16", "decode", BANDWIDTH, rotation.nbytes, run, rotation.operands)


def attention_cases() -> list[Case]:
    """Attention over bfloat16 and INT8 caches, of one query and of a prompt."""
    found = []
    for phase, tokens in CONTEXT.items():
        for heads, (query_heads, kv_heads) in attention.HEADS.items():
            rows = tokens if phase == "prefill" else 1
            query = torch.randn(1, rows, query_heads, 128).bfloat16().transpose(1, 2)
            copies = 1 if phase == "prefill" else 10
            caches = [attention.Cache.random(kv_heads, tokens, 128, torch.bfloat16) for _ in range(copies)]
            pairs = tokens * (tokens + 1) // 2 if phase == "prefill" else tokens
            for kernel in attention.kernels()[:2]:
                integers = kernel.name.startswith("INT8")
                peak = "INT8" if integers else "bfloat16" if ops.multiplies_bfloat16() else "float32"
                found.append(
                    Case(
                        f"attention, {heads}, {'INT8' if integers else 'bfloat16'} cache",
                        phase,
                        BANDWIDTH if phase == "decode" else peak,
                        kernel.nbytes(caches[0]) if phase == "decode" else 4 * query_heads * 128 * pairs,
                        partial(attention.seconds, kernel, query, caches),
                        [each for cache in caches for each in (cache.codes if integers else (cache.key, cache.value))],
                    )
                )
    return found


def share(case: Case, limits: Limits, rounds: int) -> float:
    """The median share of the limit; the first round warms up."""

    def limit() -> float:
        return limits.bandwidth_of(case.memory) if case.bound == BANDWIDTH else limits.rate(case.bound)

    shares, before = [], limit()
    for _ in range(rounds + 1):
        seconds, after = case.run(), limit()
        shares.append(case.work / seconds / max(before, after))
        before = after
    return statistics.median(shares[1:])


def measure(rounds: int, threads: int) -> list[dict[str, Any]]:
    """A record for each kernel, at the level of this process."""
    limits, level = Limits(threads), ops.isa_name()
    records = []
    with torch.inference_mode():
        for make in (linear_cases, lambda: [float_case()], attention_cases):
            for case in tqdm(make(), desc=level):
                record = {"level": level, "kernel": case.name, "phase": case.phase, "bound": case.bound}
                records.append(record | {"share": share(case, limits, rounds)})
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """Print a line for each kernel and phase, with the share at each level."""
    levels = list(dict.fromkeys(r["level"] for r in records))
    cells = {(r["phase"], r["kernel"], r["level"]): f"{r['share']:.2f} of {r['bound']}" for r in records}
    print(f"{'':54s}" + "".join(level.rjust(26) for level in levels))
    for phase, kernel in dict.fromkeys((phase, kernel) for phase, kernel, _ in cells):
        row = (cells.get((phase, kernel, level), "") for level in levels)
        print(f"{phase + ': ' + kernel:54s}" + "".join(cell.rjust(26) for cell in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--levels", nargs="+", default=ops.supported_isas()[1:], help="default: all but generic")
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.own:
        write_json(args.own, {"levels": measure(args.rounds, args.threads)})
        return
    machine, records = describe(args.threads), []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "level.json"
        for level in args.levels:
            command = [sys.executable, __file__, "--threads", f"{args.threads}", "--rounds", f"{args.rounds}"]
            subprocess.run([*command, "--own", str(out)], env=os.environ | {"IPEX_QUANT_ISA": level}, check=True)
            records += json.loads(out.read_text())["levels"]
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "levels": records})


if __name__ == "__main__":
    main()
