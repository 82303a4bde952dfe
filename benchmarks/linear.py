"""Weight-only linears against the limits of the machine and against torch's own kernels, all in one run.

Every shape is measured in rounds: a round times each kernel once, with the machine's limits measured right before and
after it (the higher counts), and ratios are taken within a round, so that a machine whose speed drifts does not distort
them. Weights rotate through more memory than the caches hold. The figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import Limits, describe
from tqdm import tqdm

from ipex_quant import ops
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype

SHAPES = {
    "1.1B": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048)],
    "8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (32000, 4096)],
}
ROWS = (1, 2, 4, 8, 32, 128, 512)
ROTATION_BYTES = 320 << 20
GROUP = 128


@dataclass(frozen=True)
class Kernel:
    """A linear under test: `prepare` turns a float weight into its operand, `run` multiplies by it."""

    name: str
    prepare: Callable[[torch.Tensor], object]
    run: Callable[[torch.Tensor, object], torch.Tensor]
    nbytes: Callable[[object], int]


def ours(name: str, dtype: WoqWeightDtype, group_size: int, lowp_mode: WoqLowpMode) -> Kernel:
    scheme = WeightScheme(dtype, True, group_size)
    act = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM if lowp_mode == WoqLowpMode.INT8 else WoqActQuantMode.NONE
    return Kernel(
        name,
        lambda w: ops.pack_weight(ops.quantize_weight(w, scheme)),
        lambda x, p: ops.woq_linear(x, p.data, p.shape[0], None, p.perm, lowp_mode, act),
        lambda p: p.nbytes,
    )


def torch_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scales_and_zeros = torch.rand(k // GROUP, n, 2).bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), scales_and_zeros


KERNELS = [
    ours("int4 g128, int8 compute", WoqWeightDtype.INT4, GROUP, WoqLowpMode.INT8),
    ours("int4 g128, bf16 compute", WoqWeightDtype.INT4, GROUP, WoqLowpMode.BF16),
    ours("int8, int8 compute", WoqWeightDtype.INT8, -1, WoqLowpMode.INT8),
    ours("nf4 g128, int8 compute", WoqWeightDtype.NF4, GROUP, WoqLowpMode.INT8),
    Kernel("torch bf16 linear", lambda w: w.bfloat16(), torch.nn.functional.linear, lambda w: w.nbytes),
    Kernel(
        "torch int4pack_mm g128",
        torch_int4,
        lambda x, p: torch.ops.aten._weight_int4pack_mm_for_cpu(x, p[0], GROUP, p[1]),
        lambda p: p[0].nbytes + p[1].nbytes,
    ),
    Kernel(
        "torch int8pack_mm",
        lambda w: ((w * 1000).to(torch.int8), torch.rand(len(w)).bfloat16()),
        lambda x, p: torch.ops.aten._weight_int8pack_mm(x, *p),
        lambda p: p[0].nbytes + p[1].nbytes,
    ),
]


class Rotation:
    """Copies of one operand that together exceed the caches; each call takes the next."""

    def __init__(self, kernel: Kernel, weight: torch.Tensor) -> None:
        self.kernel = kernel
        first = kernel.prepare(weight)
        self.nbytes = kernel.nbytes(first)
        copies = min(64, 1 + ROTATION_BYTES // self.nbytes)
        self.operands = [first, *(kernel.prepare(weight) for _ in range(copies - 1))]
        self.next = 0

    def seconds(self, x: torch.Tensor, calls: int) -> float:
        """Mean time of `calls` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            self.next = (self.next + 1) % len(self.operands)
            self.kernel.run(x, self.operands[self.next])
        return (time.perf_counter() - start) / calls


def measure(n: int, k: int, rows: tuple[int, ...], rounds: int, limits: Limits) -> list[dict]:
    """One record for each kernel and number of rows."""
    weight = torch.randn(n, k) * 0.02
    rotations = [Rotation(kernel, weight) for kernel in KERNELS]
    records = []
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        calls = {r.kernel.name: max(1, min(len(r.operands), int(0.03 / max(r.seconds(x, 1), 1e-6)))) for r in rotations}
        samples: dict[str, list[tuple[float, float, float]]] = {r.kernel.name: [] for r in rotations}
        for number in range(rounds + 1):
            before = limits.measure()
            for r in rotations:
                seconds = r.seconds(x, calls[r.kernel.name])
                after = limits.measure()
                bandwidth, peak = map(max, before, after)
                if number > 0:  # the first round warms up: the system may still be moving pages of the new weights
                    samples[r.kernel.name].append((seconds, bandwidth, peak))
                before = after
        baseline = [s[0] for s in samples["torch bf16 linear"]]
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


def measure_packing(n: int, k: int) -> list[dict]:
    """Float bytes a second through quantizing and packing one weight."""
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(n, k) * 0.02).to(dtype)
        for kernel in KERNELS[:4]:
            times = []
            for _ in range(5):
                start = time.perf_counter()
                kernel.prepare(weight)
                times.append(time.perf_counter() - start)
            rate = weight.nbytes / statistics.median(times)
            records.append({"kernel": kernel.name.split(",")[0], "input": str(dtype), "bytes_per_second": rate})
    return records


def print_table(records: list[dict]) -> None:
    shapes = dict.fromkeys((r["n"], r["k"]) for r in records)
    rows = sorted({r["m"] for r in records})
    for n, k in shapes:
        print(f"\nN = {n}, K = {k}: time in ms (share of read bandwidth | share of INT8 peak | over torch bf16 linear)")
        print(f"{'kernel':26s}" + "".join(f"{'M = ' + str(m):>30s}" for m in rows))
        for kernel in KERNELS:
            cells = {r["m"]: r for r in records if (r["n"], r["k"], r["kernel"]) == (n, k, kernel.name)}
            line = f"{kernel.name:26s}"
            for m in rows:
                r = cells[m]
                ratios = f"{r['of_bandwidth']:.2f} | {r['of_int8_peak']:.2f} | {r['over_torch_bf16']:.1f}x"
                line += f"{r['seconds'] * 1e3:>8.3f} ({ratios})".rjust(30)
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="values of M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    limits = Limits(args.threads)
    machine = describe(args.threads)
    machine["read_bandwidth"], machine["int8_rate"] = limits.measure()
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    shapes = [shape for model in args.models for shape in SHAPES[model]]
    records = []
    with torch.inference_mode():
        for n, k in tqdm(shapes, desc="shapes"):
            records += measure(n, k, tuple(args.rows), args.rounds, limits)
        packing = measure_packing(4096, 4096)
    print_table(records)
    print("\nquantizing and packing 4096 x 4096, GB/s of float input:")
    for r in packing:
        print(f"  {r['kernel']:12s} from {r['input']:15s} {r['bytes_per_second'] / 1e9:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({"machine": machine, "linear": records, "packing": packing}, indent=1) + "\n")
        temporary.replace(args.json)


if __name__ == "__main__":
    main()
