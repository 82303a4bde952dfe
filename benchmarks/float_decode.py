"""Decode steps of a Llama with float weights: stock transformers and `llm.optimize`, in interleaved rounds of one run.

"without float_linear" is `llm.optimize` with torch's linears. The figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from machine import Limits, describe
from rounds import write_json
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOAT_LINEAR = importlib.import_module("ipex_quant.ops.float_linear")  # `ops` has its function under this name
STOCK, TORCH, OURS = "transformers", "llm.optimize without float_linear", "llm.optimize"


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of about 190 million parameters with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=12,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def tokens_per_second(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int) -> float:
    """New tokens a second of a greedy `generate`, its prefill taken off."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    return tokens / (seconds(tokens + 1) - seconds(1))


def measure(name: str, prompt_length: int, tokens: int, rounds: int, limits: Limits) -> list[dict]:
    """A record for each stack."""
    stock = llama(DTYPES[name])
    optimized = ipex.llm.optimize(copy.deepcopy(stock), dtype=DTYPES[name], inplace=True)
    head = 0 if stock.config.tie_word_embeddings else stock.model.embed_tokens.weight.nbytes
    nbytes = sum(p.nbytes for p in stock.parameters()) - head  # read for a token
    prompt = torch.arange(prompt_length)[None]
    samples: dict[str, list[tuple[float, float]]] = {STOCK: [], TORCH: [], OURS: []}
    for number in tqdm(range(rounds + 1), desc=name):
        for stack, taken in samples.items():
            bandwidth = limits.bandwidths()[1]
            never = mock.patch.object(FLOAT_LINEAR, "is_native", return_value=False)
            with never if stack == TORCH else nullcontext():
                speed = tokens_per_second(stock if stack == STOCK else optimized, prompt, tokens)
            if number > 0:  # the first round warms up
                taken.append((speed, speed * nbytes / max(bandwidth, limits.bandwidths()[1])))
    return [
        {
            "dtype": name,
            "stack": stack,
            "weight_bytes": nbytes,
            "tokens_per_second": statistics.median(speed for speed, _ in taken),
            "of_tensor_bandwidth": statistics.median(share for _, share in taken),
        }
        for stack, taken in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    limits = Limits(args.threads)
    machine = describe(args.threads, **limits.best())
    records = []
    with torch.inference_mode():
        for name in args.dtypes:
            records += measure(name, args.prompt, args.new_tokens, args.rounds, limits)
    for r in records:
        speed, share = r["tokens_per_second"], r["of_tensor_bandwidth"]
        print(f"{r['dtype']:9s} {r['stack']:32s} {speed:8.2f} tokens/s, {share:.2f} of the read bandwidth")
    if args.json:
        write_json(args.json, {"machine": machine, "float_decode": records})


if __name__ == "__main__":
    main()
