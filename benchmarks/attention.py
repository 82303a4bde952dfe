"""Attention against torch SDPA and the read bandwidth, all in one run: prefill and decode, float and INT8 caches.

A round times each kernel once, with the machine's limits measured right before and after it (the higher counts), and
ratios are taken within a round. The figures are medians over the rounds. Decode reads KV caches that together exceed
the CPU's caches. Its second share is that of the bandwidth of reading a tensor, which torch allocates in small pages.
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
from rounds import ROTATION_BYTES, write_json
from tqdm import tqdm

from ipex_quant import ops

HEADS = {"MHA": (8, 8), "GQA 4:1": (16, 4), "GQA 8:1": (32, 4)}
CONTEXTS = (128, 512, 2048, 4096, 8192, 32768)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
ROUND_SECONDS = 20.0  # no new round starts after this time
SDPA = "torch SDPA"


@dataclass(frozen=True)
class Cache:
    """Keys and values, in float and in INT8."""

    key: torch.Tensor
    value: torch.Tensor
    codes: list[torch.Tensor]
    scales: list[torch.Tensor]

    @classmethod
    def random(cls, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Cache:
        floats = [torch.randn(1, kv_heads, tokens, dim).to(dtype) for _ in range(2)]
        codes = [torch.empty(x.shape, dtype=torch.int8) for x in floats]
        scales = [torch.empty(x.shape[:3]) for x in floats]
        for x, code, scale in zip(floats, codes, scales, strict=True):
            ops.write_cache(x, code, scale, 0)
        return cls(*floats, codes, scales)


@dataclass(frozen=True)
class Kernel:
    """A kernel to time, and the bytes of KV cache that one call reads."""

    name: str
    run: Callable[[torch.Tensor, Cache], torch.Tensor]
    nbytes: Callable[[Cache], int]


def kernels() -> list[Kernel]:
    """Causal attention; a single query sees all keys."""

    def floats(query: torch.Tensor, cache: Cache) -> torch.Tensor:
        return ops.attention(query, cache.key, cache.value, scale=query.shape[-1] ** -0.5, causal=True)

    def int8(query: torch.Tensor, cache: Cache) -> torch.Tensor:
        options = {"scale": query.shape[-1] ** -0.5, "causal": True}
        return ops.attention(query, *cache.codes, key_scales=cache.scales[0], value_scales=cache.scales[1], **options)

    def sdpa(query: torch.Tensor, cache: Cache) -> torch.Tensor:
        grouped = query.shape[1] != cache.key.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, cache.key, cache.value, is_causal=query.shape[2] > 1, enable_gqa=grouped)

    def float_bytes(cache: Cache) -> int:
        return cache.key.nbytes + cache.value.nbytes

    return [
        Kernel("float cache", floats, float_bytes),
        Kernel("INT8 cache", int8, lambda cache: sum(t.nbytes for t in cache.codes + cache.scales)),
        Kernel(SDPA, sdpa, float_bytes),
    ]


def seconds(kernel: Kernel, query: torch.Tensor, caches: list[Cache]) -> float:
    start = time.perf_counter()
    for cache in caches:
        kernel.run(query, cache)
    return (time.perf_counter() - start) / len(caches)


def measure(
    phase: str, heads: str, tokens: int, dim: int, dtype: torch.dtype, rounds: int, limits: Limits
) -> list[dict]:
    """One record for each kernel, for one context length."""
    query_heads, kv_heads = HEADS[heads]
    query = torch.randn(1, tokens if phase == "prefill" else 1, query_heads, dim).to(dtype).transpose(1, 2)
    first = Cache.random(kv_heads, tokens, dim, dtype)
    copies = 1 if phase == "prefill" else min(64, 1 + ROTATION_BYTES // (first.key.nbytes + first.value.nbytes))
    caches = [first, *(Cache.random(kv_heads, tokens, dim, dtype) for _ in range(copies - 1))]
    samples: dict[str, list[tuple[float, float, float]]] = {kernel.name: [] for kernel in kernels()}
    begin = time.perf_counter()
    for number in range(rounds + 1):
        if all(samples.values()) and time.perf_counter() - begin > ROUND_SECONDS:
            break
        before = limits.bandwidths()
        for kernel in kernels():
            elapsed = seconds(kernel, query, caches)
            after = limits.bandwidths()
            if number > 0 or elapsed * copies > ROUND_SECONDS / 4:  # the first round warms up
                samples[kernel.name].append((elapsed, *map(max, before, after)))
            before = after
    products = 2 * 2 * query_heads * dim * (tokens * (tokens + 1) // 2 if phase == "prefill" else tokens)

    def over(other: str, own: list[tuple[float, float, float]]) -> float:
        return statistics.median(s / o for (s, *_), (o, *_) in zip(samples[other], own, strict=False))

    records = []
    for kernel in kernels():
        own = samples[kernel.name]
        records.append(
            {
                "phase": phase,
                "heads": heads,
                "tokens": tokens,
                "kernel": kernel.name,
                "seconds": statistics.median(s for s, _, _ in own),
                "of_bandwidth": statistics.median(kernel.nbytes(first) / s / b for s, b, _ in own),
                "of_tensor_bandwidth": statistics.median(kernel.nbytes(first) / s / b for s, _, b in own),
                "flops_per_second": products / statistics.median(s for s, _, _ in own),
                "over_sdpa": over(SDPA, own),
                "over_float_cache": over("float cache", own),
            }
        )
    return records


def print_table(records: list[dict]) -> None:
    """Print a table for each phase and number of heads, with a line for each context length."""
    for phase, heads in dict.fromkeys((r["phase"], r["heads"]) for r in records):
        share = "GFLOP/s" if phase == "prefill" else "shares of read bandwidth | over float cache"
        print(f"\n{phase}, {heads}: ms ({share} | over SDPA)")
        for tokens in dict.fromkeys(r["tokens"] for r in records if (r["phase"], r["heads"]) == (phase, heads)):
            line = f"{tokens:>7d}"
            for r in records:
                if (r["phase"], r["heads"], r["tokens"]) != (phase, heads, tokens):
                    continue
                if phase == "prefill":
                    share = f"{r['flops_per_second'] / 1e9:.0f}"
                else:
                    share = f"{r['of_bandwidth']:.2f} {r['of_tensor_bandwidth']:.2f} | {r['over_float_cache']:.2f}x"
                line += f"{r['kernel']:>14s} {r['seconds'] * 1e3:9.3f} ({share} | {r['over_sdpa']:.2f}x)"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--phases", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two contexts of MHA and GQA 8:1, and two rounds")
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    if args.quick:
        args.heads, args.contexts, args.rounds = ["MHA", "GQA 8:1"], [512, 8192], 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    limits = Limits(args.threads)
    machine = describe(args.threads, head_size=args.head_size, dtype=args.dtype, **limits.best())
    cases = [(phase, heads, tokens) for phase in args.phases for heads in args.heads for tokens in args.contexts]
    records = []
    with torch.inference_mode():
        for phase, heads, tokens in tqdm(cases, desc="cases"):
            records += measure(phase, heads, tokens, args.head_size, DTYPES[args.dtype], args.rounds, limits)
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "attention": records})


if __name__ == "__main__":
    main()
