"""The child processes in which engines that generate text run and answer requests.

A child may run in an environment of its own, so this module imports the standard library only. Its one argument is its
options as JSON. It loads its model; then each line of JSON that it reads names a method of the engine and its
arguments, and it answers with a line of JSON: the result, and the memory of the process minus that before loading.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    max_positions: int = 2048
    rms_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linear_weights(self) -> int:
        """Number of weights in linears: all but the embedding, with the output layer."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary

    @property
    def layer_weights(self) -> int:
        """Number of weights in the linears of one layer."""
        return (self.linear_weights - self.hidden * self.vocabulary) // self.layers


SHAPES = {
    "llama-1.1b": Shape(hidden=2048, layers=22, intermediate=5632, heads=32, kv_heads=4),
    "llama-8b-4-layers": Shape(hidden=4096, layers=4, intermediate=14336, heads=32, kv_heads=8),
    "tiny": Shape(hidden=256, layers=2, intermediate=512, heads=4, kv_heads=2, vocabulary=512),
}
"""Shapes by name; `tiny` is for testing the benchmark itself."""


def prompt_ids(tokens: int, vocabulary: int, seed: int) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(10, vocabulary), k=tokens)


class TokenClock:
    """A transformers streamer that records the times at which `generate` gives the prompt and every new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed_generate(generate: Callable[..., Any], new_tokens: int) -> dict[str, float]:
    """Seconds of the prefill and of each decode step of a greedy `generate` of transformers."""
    clock = TokenClock()
    start = time.perf_counter()
    generate(max_new_tokens=new_tokens, do_sample=False, streamer=clock)
    if len(clock.times) != new_tokens + 1:
        raise RuntimeError(f"generate: expected {new_tokens} tokens, got {len(clock.times) - 1}")
    first, last = clock.times[1], clock.times[-1]
    return {"prefill": first - start, "decode": (last - first) / (new_tokens - 1)}


def memory() -> dict[str, int]:
    """Resident memory of this process and its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {name: int(status[field].split()[0]) << 10 for name, field in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def serve(load: Callable[..., Any], prepare: Callable[..., None] | None = None) -> None:
    """Run a child: load the engine with the options of the command line, then answer requests until stdin ends.

    With the option ``prepare`` it only writes the files that the engine needs.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to the log

    def answer(call: Callable[[], Any]) -> bool:
        try:
            result = call()
            reply = {"result": result, "memory": {name: size - before for name, size in memory().items()}}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {str(error).strip()}"}
        print(json.dumps(reply), file=answers, flush=True)
        return "result" in reply

    engine, before = None, 0

    def start() -> dict[str, Any]:
        nonlocal engine, before
        options = json.loads(sys.argv[1])
        options["shape"] = Shape(**options["shape"]) if options.get("shape") else None
        if options.pop("prepare", False):
            if prepare is not None:
                prepare(**options)
            return {}
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory()["resident"]
        engine = load(**options)
        return engine.describe()

    if answer(start) and engine is not None:
        for line in sys.stdin:
            request = json.loads(line)
            answer(lambda request=request: getattr(engine, request["method"])(**request["arguments"]))
