"""Weight-only linears against the limits of the machine and against torch's own kernels, all in one run.

`rounds.py` documents the measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import Limits, describe
from rounds import BASELINE, Kernel, measure, print_table, torch_bf16, write_json
from tqdm import tqdm

from ipex_quant import ops
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype

SHAPES = {
    "1.1B": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048)],
    "8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (32000, 4096)],
}
ROWS = (1, 2, 4, 8, 32, 128, 512)
GROUP = 128


def ours(name: str, dtype: WoqWeightDtype, group_size: int, lowp_mode: WoqLowpMode) -> Kernel:
    scheme = WeightScheme(dtype, True, group_size)

    def prepare(weight: torch.Tensor) -> ops.PackedWeight:
        return ops.pack_weight(ops.quantize_weight(weight, scheme, torch.float16))

    return Kernel(name, prepare, ours_call(lowp_mode), lambda p: p.nbytes)


def ours_call(lowp_mode: WoqLowpMode) -> Callable[[torch.Tensor, ops.PackedWeight], torch.Tensor]:
    act = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM if lowp_mode == WoqLowpMode.INT8 else WoqActQuantMode.NONE
    return lambda x, p: ops.woq_linear(x, p.data, p.shape[0], None, p.perm, lowp_mode, act)


def k_quant(weight: torch.Tensor) -> ops.PackedWeight:
    """INT4 in groups of 32 as GGUF's Q4_K: factors and minimums of groups in bytes, those of 256 features in halves."""
    plain = ops.quantize_weight(weight, WeightScheme(WoqWeightDtype.INT4, False, 32))
    runs = plain.scales.unflatten(1, (-1, 8))
    supers = (runs.amax(-1) / 63).half().float()
    steps = (runs / supers[..., None]).round()
    scales, minimums = ((part * supers[..., None]).flatten(1) for part in (steps, (steps * -8).clamp(-128)))
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32, True, 256)
    return ops.pack_weight(
        QuantizedWeight(plain.codes, scales, None, None, scheme, plain.shape, minimums, supers, supers)
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
    *(
        ours(f"{dtype.name.lower()} g{size}, int8 compute", dtype, size, WoqLowpMode.INT8)
        for dtype, size in (
            (WoqWeightDtype.INT2, GROUP),
            (WoqWeightDtype.INT3, GROUP),
            (WoqWeightDtype.INT5, GROUP),
            (WoqWeightDtype.INT6, GROUP),
            (WoqWeightDtype.INT4, 32),
            (WoqWeightDtype.FP4, 32),
            (WoqWeightDtype.FP4, 16),
            (WoqWeightDtype.IQ4, 32),
        )
    ),
    Kernel("q4_k, int8 compute", k_quant, ours_call(WoqLowpMode.INT8), lambda p: p.nbytes),
    torch_bf16(),
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


def measure_packing(n: int, k: int) -> list[dict]:
    """Float bytes per second of quantizing and packing one weight."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="values of M")
    parser.add_argument("--kernels", nargs="+", metavar="TEXT", default=[""], help="only those whose name has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    limits = Limits(args.threads)
    machine = describe(args.threads, **limits.best())
    kernels = [kernel for kernel in KERNELS if any(text in kernel.name for text in [BASELINE, *args.kernels])]
    shapes = [shape for model in args.models for shape in SHAPES[model]]
    records = []
    with torch.inference_mode():
        for shape in tqdm(shapes, desc="shapes"):
            records += measure(kernels, shape, args.rows, args.rounds, limits)
        packing = measure_packing(4096, 4096)
    print_table(records)
    print("\nquantizing and packing 4096 x 4096, GB/s of float input:")
    for r in packing:
        print(f"  {r['kernel']:12s} from {r['input']:15s} {r['bytes_per_second'] / 1e9:.2f}")
    if args.json:
        write_json(args.json, {"machine": machine, "linear": records, "packing": packing})


if __name__ == "__main__":
    main()
