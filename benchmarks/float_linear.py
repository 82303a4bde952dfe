"""Float linears of few rows against the memory's read bandwidth and against torch's kernels, all in one run.

The weights of a kernel exceed the CPU's caches together, as in `rounds.py`. A round times each kernel once, with the
read bandwidth measured right before and after it (the higher counts), of large pages and of a tensor's pages, and
ratios are taken within a round. The figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import Limits, describe
from rounds import Kernel, Rotation, call_count, write_json
from tqdm import tqdm

from ipex_quant.nn.prepacked import multiply_packed, pack_linear

SHAPES = [(4096, 4096), (2048, 5632), (768, 3072), (3072, 768)]
ROWS = (1, 2, 4, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS, TORCH, PACKED = "float_linear", "torch linear", "oneDNN, prepacked"

native = torch.ops.ipex_quant.float_linear.default


def kernels(dtype: torch.dtype) -> list[Kernel]:
    """The kernels for one dtype. oneDNN's takes weights in float32 where the CPU multiplies no lower precision."""
    found = [
        Kernel(OURS, lambda w: w.to(dtype, copy=True), lambda x, w: native(x, w, None, [], 0), lambda w: w.nbytes),
        Kernel(TORCH, lambda w: w.to(dtype, copy=True), F.linear, lambda w: w.nbytes),
    ]
    if dtype == torch.float32:
        packed = Kernel(PACKED, pack_linear, lambda x, w: multiply_packed(x, w, None), lambda w: w.numel() * 4)
        found.append(packed)
    return found


def measure(name: str, shape: tuple[int, int], rows: list[int], rounds: int, limits: Limits) -> list[dict]:
    """A record for each number of rows and kernel."""
    n, k = shape
    weight = torch.randn(n, k) * 0.02
    rotations = [Rotation(kernel, weight) for kernel in kernels(DTYPES[name])]
    records = []
    for m in rows:
        x = torch.randn(m, k).to(DTYPES[name])
        calls = [call_count(r, x) for r in rotations]
        samples: list[list[tuple[float, float, float]]] = [[] for _ in rotations]
        for number in range(rounds + 1):
            before = limits.bandwidths()
            for rotation, count, taken in zip(rotations, calls, samples, strict=True):
                seconds = rotation.seconds(x, count)
                after = limits.bandwidths()
                if number > 0:  # the first round warms up
                    taken.append((seconds, *map(max, before, after)))
                before = after
        for rotation, taken in zip(rotations, samples, strict=True):
            records.append(
                {
                    "dtype": name,
                    "n": n,
                    "k": k,
                    "m": m,
                    "kernel": rotation.kernel.name,
                    "seconds": statistics.median(s for s, _, _ in taken),
                    "weight_bytes": rotation.nbytes,
                    "of_bandwidth": statistics.median(rotation.nbytes / s / b for s, b, _ in taken),
                    "of_tensor_bandwidth": statistics.median(rotation.nbytes / s / b for s, _, b in taken),
                    "over_torch": statistics.median(t[0] / s[0] for t, s in zip(samples[1], taken, strict=True)),
                }
            )
    return records


def print_table(records: list[dict]) -> None:
    """A line for each dtype, shape and kernel."""
    print("\nshare of read bandwidth in large pages | in a tensor's pages | over torch's linear")
    lines: dict[tuple[str, int, int, str], list[str]] = {}
    for r in records:
        cell = f"M={r['m']} {r['of_bandwidth']:.2f} | {r['of_tensor_bandwidth']:.2f} | {r['over_torch']:.2f}x"
        lines.setdefault((r["dtype"], r["n"], r["k"], r["kernel"]), []).append(cell)
    for (dtype, n, k, kernel), cells in lines.items():
        print(f"{dtype:9s} {n:5d} x {k:5d} {kernel:18s}" + "".join(cell.rjust(30) for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="values of M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    limits = Limits(args.threads)
    machine = describe(args.threads, **limits.best())
    records = []
    with torch.inference_mode():
        for name in args.dtypes:
            for shape in tqdm(SHAPES, desc=name):
                records += measure(name, shape, args.rows, args.rounds, limits)
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "float_linear": records})


if __name__ == "__main__":
    main()
