"""llama.cpp as an engine of the benchmarks (see engines.py), through llama-cpp-python, in an environment of its own."""

from __future__ import annotations

import os
import time
from typing import Any

import llama_cpp
import numpy as np
from engines import Shape, prompt_ids, serve
from random_gguf import prepare

CONTEXT = 2048


class Engine:
    """A GGUF model. `generate` is greedy and does not stop at an end token."""

    def __init__(self, path: str, threads: int) -> None:
        self.size, start = os.path.getsize(path), time.perf_counter()
        sizes = {"n_ctx": CONTEXT, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(path, **sizes, flash_attn=True)  # faster, and the default of llama.cpp's tools
        self.vocabulary, self.seconds = self.model.n_vocab(), time.perf_counter() - start
        self.path, self.sizes = path, sizes

    def describe(self) -> dict[str, Any]:
        version = f"llama-cpp-python {llama_cpp.__version__}"
        return {"weight_bytes": self.size, "loading_seconds": self.seconds, "version": version}

    def generate(self, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        ids = prompt_ids(prompt, self.vocabulary, seed)
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids)
        token = self._best()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            self.model.eval([token])
            token = self._best()
        last = time.perf_counter()
        return {"prefill": first - start, "decode": (last - first) / (new_tokens - 1)}

    def decode(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Median seconds of a step of `batch` sequences."""
        slots = Slots(self, batch, batch * (prompt + new_tokens + 2))
        slots.answer([prompt_ids(prompt, self.vocabulary, seed + i) for i in range(batch)], new_tokens + 1)
        steps = sorted(slots.steps[-new_tokens:])
        return {"seconds": steps[len(steps) // 2]}

    def requests(self, lengths: list[int], new_tokens: int, seed: int) -> dict[str, float]:
        """Seconds until all requests are answered."""
        slots = Slots(self, len(lengths), sum(lengths) + len(lengths) * new_tokens)
        prompts = [prompt_ids(n, self.vocabulary, 1000 * seed + i) for i, n in enumerate(lengths)]
        start = time.perf_counter()
        slots.answer(prompts, new_tokens)
        return {"seconds": time.perf_counter() - start}

    def loss(self, windows: list[list[int]]) -> dict[str, float]:
        """Sum of the negative log-likelihoods of all tokens of the windows but their first ones."""
        model = llama_cpp.Llama(self.path, **self.sizes, logits_all=True, verbose=False)
        total = 0.0
        for window in windows:
            model.reset()
            model.eval(window)
            logits = model.scores[: len(window) - 1].astype(np.float64)
            highest = logits.max(axis=1, keepdims=True)
            normalizer = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
            total += float((normalizer - logits[np.arange(len(window) - 1), window[1:]]).sum())
        return {"loss": total}

    def _best(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


class Slots:
    """Sequences that run together as in llama.cpp's server: a step has a token of each, then parts of prompts."""

    def __init__(self, engine: Engine, count: int, tokens: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = tokens, 512, 512, count
        options.n_threads = options.n_threads_batch = engine.sizes["n_threads"]
        options.flash_attn_type, options.kv_unified = 1, True
        self.vocabulary, self.steps = engine.vocabulary, []
        self.context = llama_cpp.llama_init_from_model(engine.model.model, options)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def answer(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Decode greedily until every sequence has `new_tokens`."""
        todo = [list(ids) for ids in prompts]
        places, left = [0] * len(prompts), [new_tokens] * len(prompts)
        while any(left):
            start = time.perf_counter()
            rows, last = [], {}
            order = sorted((i for i in range(len(prompts)) if left[i]), key=lambda i: len(todo[i]) > 1)
            for i in order:
                taken = todo[i][: 512 - len(rows)]
                rows += [(token, places[i] + n, i) for n, token in enumerate(taken)]
                places[i] += len(taken)
                todo[i] = todo[i][len(taken) :]
                if taken and not todo[i]:
                    last[i] = len(rows) - 1
            self._decode(rows, set(last.values()))
            for i, row in last.items():
                logits = llama_cpp.llama_get_logits_ith(self.context, row)
                todo[i] = [int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())]
                left[i] -= 1
            self.steps.append(time.perf_counter() - start)
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def _decode(self, rows: list[tuple[int, int, int]], wanted: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, place, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, place, 1
            batch.seq_id[row][0], batch.logits[row] = sequence, row in wanted
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")


def load(shape: Shape, path: str, threads: int, **_: Any) -> Engine:
    return Engine(path, threads)


if __name__ == "__main__":
    serve(load, prepare)
