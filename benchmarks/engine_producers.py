"""Stock transformers with the packages that wrote a checkpoint, as an engine of the benchmarks (see engines.py).

The package of the checkpoint's `quant_method`, GPTQModel or auto-round (with auto-round-lib, which has its kernels),
packs the weights for the kernel that it prefers on this CPU. It runs in an environment of its own.
"""

from __future__ import annotations

import importlib
import os
import time
from importlib.metadata import version
from typing import Any

import torch
from engines import Shape, prompt_ids, serve, timed_generate
from transformers import AutoModelForCausalLM, PreTrainedModel

WORKERS = "2"
"""Threads with which GPTQModel loads; on two cores it would take one, and then refuse to load with less than two."""


class Engine:
    """A transformers model whose linear layers are those of `package`. `generate` does not stop at an end token."""

    def __init__(self, model: PreTrainedModel, package: str, seconds: float) -> None:
        self.model, self.package, self.seconds = model, package, seconds
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0

    def describe(self) -> dict[str, Any]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        kernel = type(self.model.model.layers[0].self_attn.q_proj)
        return {
            "weight_bytes": sum(storages.values()),
            "loading_seconds": self.seconds,
            "kernel": f"{kernel.__module__}.{kernel.__name__}",
            "version": f"{self.package} {version(self.package)}, torch {torch.__version__}",
        }

    def generate(self, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        ids = torch.tensor([prompt_ids(prompt, self.model.config.vocab_size, seed)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            return timed_generate(lambda **options: self.model.generate(**inputs, **options), new_tokens)


def load(shape: Shape, path: str, package: str, threads: int) -> Engine:
    """Load the checkpoint in `path`, whose kernels are in `package`, after its import."""
    torch.set_num_threads(threads)
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", WORKERS)
    importlib.import_module(package.replace("-", "_"))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu").eval()
    return Engine(model, package, time.perf_counter() - start)


if __name__ == "__main__":
    serve(load)
