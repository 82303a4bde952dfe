"""Mixtures of experts against the read bandwidth of the chosen experts' weights and against transformers, in one run.

Every call uses other experts, so that a decode step reads weights that are not in the CPU's caches. `rounds.py`
documents the measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import Limits, describe
from rounds import write_json
from tqdm import tqdm
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ipex_quant.nn import WeightOnlyQuantizedExperts
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

SHAPES = {"qwen3-30b-a3b": (2048, 768, 128, 8), "mixtral-8x7b": (4096, 14336, 8, 2)}
"""Hidden size, intermediate size, number of experts, and experts per token."""

BASELINE = "torch bf16 grouped_mm"
TOKENS = (1, 4, 32, 512)


@dataclass
class Contender:
    """Experts under test: `run` computes them for tokens; `expert_bytes` are the weight bytes of one expert."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    expert_bytes: float
    next: int = 0


def stock(shape: tuple[int, int, int, int]) -> Qwen3MoeExperts:
    hidden, width, experts, _ = shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=experts)
    module = Qwen3MoeExperts(config).bfloat16()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module.requires_grad_(False)


def contenders(shape: tuple[int, int, int, int]) -> list[Contender]:
    module = stock(shape)
    experts = shape[2]
    float_bytes = sum(p.nbytes for p in module.parameters()) / experts

    def run_stock(implementation: str) -> Callable[..., torch.Tensor]:
        def run(*arguments: torch.Tensor) -> torch.Tensor:
            module.config._experts_implementation = implementation
            return module(*arguments)

        return run

    found = [Contender(f"torch bf16 {name}", run_stock(name), float_bytes) for name in ("grouped_mm", "eager")]
    for dtype, group_size, mode in (
        (WoqWeightDtype.INT4, 128, WoqLowpMode.INT8),
        (WoqWeightDtype.INT4, 128, WoqLowpMode.BF16),
        (WoqWeightDtype.INT8, -1, WoqLowpMode.INT8),
    ):
        mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, group_size=group_size, lowp_mode=mode)
        module.qconfig = mapping.global_qconfig
        quantized = WeightOnlyQuantizedExperts.from_float(module)
        name = f"{quantized.scheme}, {mode.name.lower()} compute"
        found.append(Contender(name, quantized, quantized.nbytes / experts))
    return found


def route(contender: Contender, tokens: int, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Expert indices ``[tokens, choices]``: for one token those after the last call's, for many random ones."""
    experts, choices = shape[2:]
    if tokens > 1:
        return torch.rand(tokens, experts).topk(choices).indices
    contender.next += choices
    return (torch.arange(choices) + contender.next).remainder(experts)[None]


def seconds(contender: Contender, x: torch.Tensor, shape: tuple[int, int, int, int], calls: int) -> tuple[float, float]:
    """Mean seconds of a call, and mean bytes of the experts chosen in it."""
    chosen = [route(contender, len(x), shape) for _ in range(calls)]
    weights = torch.full(chosen[0].shape, 1 / shape[3], dtype=x.dtype)
    start = time.perf_counter()
    for experts in chosen:
        contender.run(x, experts, weights)
    mean = (time.perf_counter() - start) / calls
    return mean, contender.expert_bytes * statistics.mean(len(experts.unique()) for experts in chosen)


def measure(name: str, rounds: int, limits: Limits, rows: list[int]) -> list[dict]:
    """One record for each contender and number of tokens, with medians of ratios within a round."""
    shape = SHAPES[name]
    found = contenders(shape)
    records = []
    for tokens in rows:
        x = torch.randn(tokens, shape[0]).bfloat16()
        calls = {each.name: max(1, min(64, int(0.03 / seconds(each, x, shape, 1)[0]))) for each in found}
        samples = {each.name: [] for each in found}
        for number in range(rounds + 1):
            before = limits.measure()
            for each in found:
                time_taken, nbytes = seconds(each, x, shape, calls[each.name])
                after = limits.measure()
                if number > 0:  # the first round warms up
                    samples[each.name].append((time_taken, nbytes, *map(max, before, after)))
                before = after
        flops = 2 * 3 * tokens * shape[3] * shape[0] * shape[1]
        baseline = [sample[0] for sample in samples[BASELINE]]
        for each in found:
            own = samples[each.name]
            records.append(
                {
                    "shape": name,
                    "tokens": tokens,
                    "experts": each.name,
                    "seconds": statistics.median(sample[0] for sample in own),
                    "of_bandwidth": statistics.median(nbytes / s / bandwidth for s, nbytes, bandwidth, _ in own),
                    "of_int8_peak": statistics.median(flops / s / peak for s, _, _, peak in own),
                    "over_torch_bf16": statistics.median(b / s[0] for b, s in zip(baseline, own, strict=True)),
                }
            )
    return records


def print_table(records: list[dict]) -> None:
    for name in dict.fromkeys(r["shape"] for r in records):
        hidden, width, experts, choices = SHAPES[name]
        print(f"\n{name}: hidden {hidden}, intermediate {width}, {choices} of {experts} experts")
        print("time in ms (share of the read bandwidth of chosen experts | share of INT8 peak | over torch bf16)")
        own = [r for r in records if r["shape"] == name]
        rows = list(dict.fromkeys(r["tokens"] for r in own))
        print(" " * 34 + "".join(f"{f'{n} tokens':>32s}" for n in rows))
        for kind in dict.fromkeys(r["experts"] for r in own):
            line = f"{kind:34s}"
            for r in (r for r in own if r["experts"] == kind):
                ratios = f"{r['of_bandwidth']:.2f} | {r['of_int8_peak']:.2f} | {r['over_torch_bf16']:.1f}x"
                line += f"{r['seconds'] * 1e3:.3f} ({ratios})".rjust(32)
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    limits = Limits(args.threads)
    machine = describe(args.threads, **limits.best())
    with torch.inference_mode():
        shapes = tqdm(args.shapes, desc="shapes")
        records = [record for name in shapes for record in measure(name, args.rounds, limits, args.tokens)]
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "experts": records})


if __name__ == "__main__":
    main()
