"""This package and stock transformers as engines of the benchmarks (see engines.py)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from engines import Shape, prompt_ids, serve, timed_generate
from random_llama import random_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ipex_quant import data, llm, quantization
from ipex_quant.evaluation import model_bytes
from ipex_quant.llm.decoder.linears import linear_call, linear_calls
from ipex_quant.ops import PostOp

DTYPE = torch.bfloat16


def float_model(shape: Shape | None) -> PreTrainedModel:
    """A Llama of random weights; without a shape, the embedded model."""
    if shape is not None:
        return random_llama(shape)
    return AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), dtype=DTYPE, local_files_only=True).eval()


def qconfig(weights: str) -> Any:
    """The configuration for `weights`: a weight dtype, in groups of 128 computed in INT8, or "w8a8", dynamic."""
    if weights == "w8a8":
        return quantization.default_dynamic_qconfig_mapping
    dtype = quantization.WoqWeightDtype[weights.upper()]
    return quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=dtype, group_size=128, lowp_mode=quantization.WoqLowpMode.INT8, scale_dtype=torch.float16
    )


def build(shape: Shape | None, weights: str, stack: str, kv_cache: str | None) -> PreTrainedModel:
    """A model with `weights` as in `qconfig`, or "bf16"; `stack` is the code around the linears: "ours" or "stock"."""
    model = float_model(shape)
    if stack == "ours":
        dtype = None if kv_cache is None else getattr(torch, kv_cache)
        return llm.optimize(
            model, dtype=DTYPE, quantization_config=qconfig(weights), kv_cache_dtype=dtype, inplace=True
        )
    if weights != "bf16":
        model = quantization.convert(quantization.prepare(model, qconfig(weights), inplace=True), inplace=True)
    return model


class Engine:
    """A transformers model."""

    def __init__(self, model: PreTrainedModel, stack: str, compiled: bool, seconds: float) -> None:
        self.model, self.stack, self.seconds = model, stack, seconds
        model.generation_config.eos_token_id = None  # so that generation does not stop early
        model.generation_config.pad_token_id = 0
        if compiled:
            model.forward = torch.compile(model.forward)

    def describe(self) -> dict[str, Any]:
        modules = [m for m in self.model.modules() if not isinstance(m, nn.Embedding)]
        linears = sum(
            m.nbytes if hasattr(m, "nbytes") else m.weight.nbytes
            for m in modules
            if hasattr(m, "nbytes") or isinstance(m, nn.Linear)
        )
        return {
            "weight_bytes": model_bytes(self.model),
            "linear_bytes": linears,
            "times_gemm": True,
            "loading_seconds": self.seconds,
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }

    def generate(self, prompt: int, new_tokens: int, seed: int, beams: int = 1) -> dict[str, float]:
        """Seconds of the prefill and of each decode step; with several beams, of the whole generation."""
        ids = torch.tensor([prompt_ids(prompt, self.model.config.vocab_size, seed)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            if beams == 1:
                return timed_generate(lambda **options: self.model.generate(**inputs, **options), new_tokens)
            start = time.perf_counter()
            self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=beams)
            return {"total": time.perf_counter() - start}

    def loss(self, windows: list[list[int]]) -> dict[str, float]:
        """Sum of the negative log-likelihoods of all tokens of the windows but their first ones."""
        total = 0.0
        with torch.inference_mode():
            for window in windows:
                ids = torch.tensor([window])
                logits = self.model(input_ids=ids).logits[0, :-1].float()
                total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        return {"loss": total}

    def gemm(self, prompt: int, repeats: int = 8) -> dict[str, float]:
        """Seconds of the linears alone: of a prefill with `prompt` tokens and of a decode step."""
        hidden, linears = self.model.config.hidden_size, Linears(self.model, fused=self.stack == "ours")
        many, one = torch.randn(1, prompt, hidden).to(DTYPE), torch.randn(1, 1, hidden).to(DTYPE)
        with torch.inference_mode():
            return {
                "prefill": linears.seconds(many),
                "decode": statistics.median(linears.seconds(one) for _ in range(repeats)),
            }


class Linears:
    """The linears of a Llama alone, called in the order of a decode step.

    With `fused`, q, k and v are one call, and gate and up another, with the gated activation in its epilogue.
    """

    def __init__(self, model: PreTrainedModel, fused: bool) -> None:
        def call_all(x: torch.Tensor, modules: Sequence[nn.Module]) -> torch.Tensor:
            return [module(x) for module in modules][-1]

        def first_of(x: torch.Tensor, group: Callable[[torch.Tensor], list[torch.Tensor]]) -> torch.Tensor:
            return group(x)[0]

        self.layers: list[list[Callable[[torch.Tensor], torch.Tensor]]] = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            query_first, pair = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
            if fused:
                qkv = partial(first_of, group=linear_calls(query_first))
                gate_up = partial(linear_calls(pair).gated, activation=PostOp.SILU)
                self.layers.append([qkv, linear_call(attention.o_proj), gate_up, linear_call(mlp.down_proj)])
            else:
                qkv, gate_up = partial(call_all, modules=query_first[::-1]), partial(call_all, modules=pair)
                self.layers.append([qkv, attention.o_proj, gate_up, mlp.down_proj])
        self.output = model.lm_head

    def seconds(self, x: torch.Tensor) -> float:
        """Seconds of the linears of one step; the output layer gets the last token only."""
        start = time.perf_counter()
        for qkv, attention_output, gate_up, down in self.layers:
            attention_output(qkv(x))
            down(gate_up(x))
        self.output(x[:, -1:])
        return time.perf_counter() - start


def file_model(path: str, lowp_mode: str) -> PreTrainedModel:
    """The model in a file or directory; "NONE" computes in bfloat16, "INT8" with activations in INT8."""
    mapping = quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=quantization.WoqWeightDtype.INT4, lowp_mode=quantization.WoqLowpMode[lowp_mode]
    )
    return llm.from_pretrained(path, dtype=DTYPE, quantization_config=mapping)


def load(
    shape: Shape | None,
    threads: int,
    weights: str = "bf16",
    stack: str = "ours",
    kv_cache: str | None = None,
    compiled: bool = False,
    path: str | None = None,
    lowp_mode: str = "NONE",
    **_: Any,
) -> Engine:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = build(shape, weights, stack, kv_cache) if path is None else file_model(path, lowp_mode)
    return Engine(model, stack, compiled, time.perf_counter() - start)


if __name__ == "__main__":
    serve(load)
