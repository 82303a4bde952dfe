"""OpenVINO as an engine of the benchmarks (see engines.py), through optimum-intel, in an environment of its own."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from engines import Shape, prompt_ids, serve, timed_generate
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from random_llama import random_llama

QUANTIZATION = {
    "int4": {"bits": 4, "group_size": 128, "sym": True, "ratio": 1.0, "all_layers": True},
    "int8": {"bits": 8, "sym": True},
}
"""Quantization options: all matrices of a model have one type, as in the other engines."""


def prepare(shape: Shape, weights_type: str, path: str, **_: Any) -> None:
    """Export a Llama of random weights."""
    folder = Path(path)
    if folder.exists():
        return
    source, temporary = folder.with_suffix(".float"), folder.with_suffix(".tmp")
    for old in (source, temporary):
        shutil.rmtree(old, ignore_errors=True)
    random_llama(shape).save_pretrained(source)
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(**QUANTIZATION[weights_type])
    )
    model.save_pretrained(temporary)
    shutil.rmtree(source)
    temporary.rename(folder)


class Engine:
    """An exported model, run by transformers' `generate`."""

    def __init__(self, path: str, threads: int) -> None:
        self.size = sum(file.stat().st_size for file in Path(path).glob("*.bin"))
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self.model = OVModelForCausalLM.from_pretrained(path, export=False, ov_config=options)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def describe(self) -> dict[str, Any]:
        compiled = self.model.request.get_compiled_model()
        properties = ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        versions = [f"{name} {metadata.version(name)}" for name in ("openvino", "optimum-intel", "transformers")]
        return {
            "weight_bytes": self.size,
            "version": ", ".join(versions),
            "properties": {name: str(compiled.get_property(name)) for name in properties},
        }

    def generate(self, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        ids = torch.tensor([prompt_ids(prompt, self.model.config.vocab_size, seed)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return timed_generate(lambda **options: self.model.generate(**inputs, **options), new_tokens)


def load(shape: Shape, path: str, threads: int, **_: Any) -> Engine:
    return Engine(path, threads)


if __name__ == "__main__":
    serve(load, prepare)
