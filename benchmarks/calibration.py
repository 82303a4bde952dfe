"""The cost of calibration: forward passes of a prepared model and of the float model, alternating, in one run.

The model is two blocks of the Llama-1.1B shape with random weights. The figures are medians of the ratio over the
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from machine import describe
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant.quantization import get_smooth_quant_qconfig_mapping, prepare

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
TOKENS = 512


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Time of one forward pass."""
    start = time.perf_counter()
    model(input_ids=ids)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    describe(args.threads)
    print(f"Llama, {SHAPE['num_hidden_layers']} blocks, {TOKENS} tokens: observed forward over float forward")
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
    mappings = {
        "smoothquant": get_smooth_quant_qconfig_mapping(),
        "static, histograms": ipex.quantization.default_static_qconfig_mapping,
    }
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()
        for name, mapping in mappings.items():
            prepared = prepare(model, mapping, example_kwarg_inputs={"input_ids": ids[:, :8]})
            with torch.inference_mode():
                pairs = [(seconds(prepared, ids), seconds(model, ids)) for _ in range(args.rounds + 1)][1:]
            ratio = statistics.median(observed / plain for observed, plain in pairs)
            plain = statistics.median(plain for _, plain in pairs)
            print(f"  {dtype!s:15s} {name:20s} {ratio:.3f} (float forward {plain:.2f} s)")


if __name__ == "__main__":
    main()
