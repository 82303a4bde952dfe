"""ik_llama.cpp as an engine of the benchmarks (see engines.py), through ik-llama-cpp-python, in its own environment.

Its wheel is compiled for AVX2; the Makefile compiles its sources for the CPU at hand. Weights are interleaved while
they are loaded, which its own tools do on demand. Flash attention is left off where the CPU has no VNNI: the package
does so, since it may fail there.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARY = Path(sys.prefix) / "build" / "src" / "libllama.so"
os.environ["IK_LLAMA_CPP_LIB_PATH"] = str(LIBRARY)  # read when the package is imported

import numpy as np  # noqa: E402
from engines import Shape, prompt_ids, serve  # noqa: E402
from ik_llama_cpp import _ctypes_api as api  # noqa: E402
from ik_llama_cpp._internals import make_batch_range  # noqa: E402
from random_gguf import prepare  # noqa: E402

CONTEXT = 2048


class Engine:
    """A GGUF model. `generate` is greedy and does not stop at an end token."""

    def __init__(self, path: str, threads: int) -> None:
        self.size, start = os.path.getsize(path), time.perf_counter()
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.use_mmap, options.repack_tensors = False, True
        self.model = api.llama_model_load_from_file(path.encode(), options)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, 512, 512
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn = not {"avx_vnni", "avx512_vnni"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
        self.context = api.llama_init_from_model(self.model, options)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.seconds = time.perf_counter() - start

    def describe(self) -> dict[str, Any]:
        package = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"
        return {"weight_bytes": self.size, "loading_seconds": self.seconds, "version": package}

    def generate(self, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        ids = prompt_ids(prompt, self.vocabulary, seed)
        api.llama_kv_cache_clear(self.context)
        start = time.perf_counter()
        token = self._step(ids, 0)
        first = time.perf_counter()
        for place in range(prompt, prompt + new_tokens - 1):
            token = self._step([token], place)
        last = time.perf_counter()
        return {"prefill": first - start, "decode": (last - first) / (new_tokens - 1)}

    def _step(self, ids: list[int], place: int) -> int:
        """The best token after `ids`, the first of which is at `place`."""
        batch = make_batch_range(ids, pos_start=place)
        status = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
        logits = api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def load(shape: Shape, path: str, threads: int, **_: Any) -> Engine:
    return Engine(path, threads)


if __name__ == "__main__":
    serve(load, prepare)
