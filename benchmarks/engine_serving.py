"""This package with many sequences at once, as an engine of serving.py (see engines.py)."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch
from engine_torch import Engine as TorchEngine
from engine_torch import build, file_model
from engines import Shape, prompt_ids, serve
from random_llama import random_llama
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from ipex_quant import llm, quantization
from ipex_quant.llm.cache.naming import CACHE

PAGE = 64
CHUNK = 512
LONG = 2048


def prepare(shape: Shape, path: str, **_: Any) -> None:
    """Write a model directory for vLLM: bfloat16, or GPTQ by its name."""
    if Path(path).exists():
        return
    model = random_llama(shape)
    if path.endswith("bf16"):
        model.save_pretrained(path)
        return
    scheme = quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=quantization.WoqWeightDtype.INT4,
        group_size=128,
        weight_qscheme=quantization.WoqWeightQScheme.SYMMETRIC,
    )
    llm.export(llm.optimize(model, quantization_config=scheme, inplace=True), path, format="gptq")


class Engine(TorchEngine):
    """A transformers model; requests run by transformers' continuous batching."""

    def decode(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Median seconds of a step of `batch` sequences."""
        ids = torch.tensor([prompt_ids(prompt, self.model.config.vocab_size, seed + i) for i in range(batch)])
        steps = []
        with torch.inference_mode():
            output = self.model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(new_tokens + 1):
                token = output.logits[:, -1:].argmax(-1)
                start = time.perf_counter()
                output = self.model(token, **{CACHE: output[CACHE]}, use_cache=True)
                steps.append(time.perf_counter() - start)
        return {"seconds": sorted(steps[1:])[new_tokens // 2]}

    def requests(self, lengths: list[int], new_tokens: int, seed: int) -> dict[str, float]:
        """Seconds until all requests are answered."""
        prompts = [prompt_ids(n, self.model.config.vocab_size, 1000 * seed + i) for i, n in enumerate(lengths)]
        manager = self._manager(sum(lengths) + len(lengths) * (new_tokens + PAGE), new_tokens)
        start = time.perf_counter()
        for ids in prompts:
            manager.add_request(ids)
        results = [manager.get_result(timeout=600) for _ in prompts]
        seconds = time.perf_counter() - start
        manager.stop(block=True)
        if any(len(result.generated_tokens) != new_tokens for result in results):
            raise RuntimeError("a request was not answered in full")
        return {"seconds": seconds}

    def stall(self, seed: int) -> dict[str, float]:
        """Eight sequences decode when a long prompt comes: their longest pause, and what a chunk of it takes alone."""
        vocabulary = self.model.config.vocab_size
        manager = self._manager(16 * CHUNK + LONG, 400)
        names = [manager.add_request(prompt_ids(64, vocabulary, seed + i), streaming=True) for i in range(8)]
        times: dict[str, list[float]] = {name: [] for name in names}
        long, sent, answered = None, 0.0, 0.0
        while not answered or min(map(len, times.values())) < 8 or len(times[names[0]]) < 60:
            result = manager.get_result(timeout=600)
            now = time.perf_counter()
            if result.request_id == long:
                answered = answered or now
            else:
                times[result.request_id].append(now)
            if long is None and len(times[names[-1]]) == 30:
                ids, sent = prompt_ids(LONG - 8, vocabulary, seed + 99), now
                long = manager.add_request(ids, streaming=True, max_new_tokens=4)
        manager.stop(block=True)
        pauses = sorted(b - a for each in times.values() for a, b in itertools.pairwise(each))
        start = time.perf_counter()
        with torch.inference_mode():
            self.model(torch.tensor([prompt_ids(CHUNK, vocabulary, seed)]), use_cache=True, logits_to_keep=1)
        chunk = time.perf_counter() - start
        return {
            "longest_pause": pauses[-1],
            "median_pause": pauses[len(pauses) // 2],
            "chunk_alone": chunk,
            "first_token": answered - sent,
        }

    def _manager(self, tokens: int, new_tokens: int) -> Any:
        options = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        config = ContinuousBatchingConfig(num_blocks=tokens // PAGE + 64, page_size=PAGE, max_batch_tokens=CHUNK)
        manager = self.model.init_continuous_batching(options, config)
        manager.start()
        return manager

    def lookup(self, seed: int) -> dict[str, float]:
        """Tokens a second, prompt included, where the model quotes its prompt, with prompt lookup and without."""
        tokenizer = llm.load_tokenizer(self.path)
        words = QUOTED.split(". ")
        text = ". ".join(words[seed % len(words) :] + words[: seed % len(words)])
        chat = [{"role": "user", "content": f"Repeat this text word by word:\n\n{text}"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        rates, tokens = {}, {}
        for name, options in (("plain", {}), ("lookup", {"prompt_lookup_num_tokens": 10})):
            start = time.perf_counter()
            with torch.inference_mode():
                ids = self.model.generate(**inputs, max_new_tokens=96, do_sample=False, **options)
            tokens[name] = ids[0, inputs["input_ids"].shape[1] :].tolist()
            rates[name] = len(tokens[name]) / (time.perf_counter() - start)
        same = sum(a == b for a, b in zip(*tokens.values(), strict=False)) / len(tokens["plain"])
        return {**rates, "lookup_over_plain": rates["lookup"] / rates["plain"], "same_tokens": same}


QUOTED = (
    "The library of a small town opens at nine in the morning. A woman in a green coat waits at the door with three "
    "books about birds. She has read two of them and will keep the last one for another week. The librarian counts "
    "the returned books and puts a stamp into each of them. On the second floor two students look for a map of the "
    "river from the year of the flood. They find it in a drawer under old newspapers. The map shows seven bridges, of "
    "which only four are left today"
)


def load(
    shape: Shape | None, threads: int, weights: str = "int4", path: str | None = None, lowp_mode: str = "INT8", **_: Any
) -> Engine:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = build(shape, weights, "ours", None) if path is None else file_model(path, lowp_mode)
    engine = Engine(model, "ours", False, time.perf_counter() - start)
    engine.path = path
    return engine


if __name__ == "__main__":
    serve(load, prepare)
