"""W8A8 linears against the limits of the machine and against torch's own kernels, all in one run.

`rounds.py` documents the measurement. "w8a8" takes and returns bfloat16, and includes activation quantization; kernels
named "alone" take activations that are already quantized, and `torch._int_mm` returns int32 sums.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path

import torch
from machine import Limits, describe
from rounds import Kernel, mean_seconds, measure, print_table, torch_bf16, write_json
from tqdm import tqdm

from ipex_quant import ops
from ipex_quant.numerics.scheme import WeightScheme

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
ROWS = (1, 2, 4, 8, 32, 128, 512, 1024)
SCALE, ZERO_POINT = 0.05, 128

scales, zero_points = torch.tensor([SCALE]), torch.tensor([ZERO_POINT], dtype=torch.int32)


def pack(weight: torch.Tensor) -> ops.PackedInt8:
    return ops.pack_int8([ops.quantize_weight(weight, WeightScheme())])


@functools.cache
def multiplier(k: int) -> torch.Tensor:
    return torch.full((k,), 1 / SCALE)


def quantize(x: torch.Tensor) -> torch.Tensor:
    return ops.quantize_activation(x, multiplier(x.shape[1]), ZERO_POINT)


def linear(x: torch.Tensor, packed: ops.PackedInt8) -> torch.Tensor:
    return ops.int8_linear(x, scales, zero_points, packed, None, torch.bfloat16)[0]


def onednn_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qw = ops.quantize_weight(weight, WeightScheme())
    packed = torch.ops.onednn.qlinear_prepack(qw.codes, None)
    return packed, qw.scales.flatten(), torch.zeros(len(weight), dtype=torch.int64)


def onednn_linear(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        x, SCALE, ZERO_POINT, *weight, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )


KERNELS = [
    Kernel("w8a8 static", pack, lambda x, p: linear(quantize(x), p), lambda p: p.nbytes),
    Kernel(
        "w8a8 dynamic",
        pack,
        lambda x, p: ops.int8_linear(*ops.quantize_activation_per_token(x), p, None, torch.bfloat16),
        lambda p: p.nbytes,
    ),
    Kernel("int8_linear alone", pack, linear, lambda p: p.nbytes, quantize),
    torch_bf16(),
    Kernel(
        "torch._int_mm alone",
        lambda w: ops.quantize_weight(w, WeightScheme()).codes.t(),
        torch._int_mm,
        lambda w: w.nbytes,
        lambda x: (quantize(x).int() - ZERO_POINT).to(torch.int8),
    ),
    Kernel("onednn qlinear alone", onednn_weight, onednn_linear, lambda w: w[0].numel(), quantize),
]


def measure_quantization(k: int, rows: list[int], rounds: int) -> list[dict]:
    """Seconds of one activation quantization for each number of rows: medians over the rounds."""
    records = []
    kinds = {"static": quantize, "dynamic": ops.quantize_activation_per_token}
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        for kind, run in kinds.items():
            times = [mean_seconds(functools.partial(run, x), 10) for _ in range(rounds + 1)]
            records.append({"k": k, "m": m, "kind": kind, "seconds": statistics.median(times[1:])})
    return records


def print_quantization(records: list[dict], linears: list[dict]) -> None:
    """Print the times, with their share of the time of `int8_linear`, for every weight shape."""
    alone = {(r["n"], r["k"], r["m"]): r["seconds"] for r in linears if r["kernel"] == "int8_linear alone"}
    print("\nactivation quantization from bfloat16, time in ms (share of int8_linear's)")
    for n, k in dict.fromkeys((n, k) for n, k, _ in alone):
        for kind in ("static", "dynamic"):
            line = f"  N = {n}, K = {k}, {kind}:"
            for r in records:
                if (r["k"], r["kind"]) == (k, kind):
                    line += f"  M = {r['m']} {r['seconds'] * 1e3:.3f} ({r['seconds'] / alone[n, k, r['m']]:.1%})"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="weights, as NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="values of M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    limits = Limits(args.threads)
    machine = describe(args.threads, activations="bfloat16", **limits.best())
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    records = []
    with torch.inference_mode():
        for shape in tqdm(shapes, desc="shapes"):
            records += measure(KERNELS, shape, args.rows, args.rounds, limits)
        columns = dict.fromkeys(k for _, k in shapes)
        quantization = [r for k in columns for r in measure_quantization(k, args.rows, args.rounds)]
    print_table(records)
    print_quantization(quantization, records)
    if args.json:
        write_json(args.json, {"machine": machine, "linear": records, "quantization": quantization})


if __name__ == "__main__":
    main()
