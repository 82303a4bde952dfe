"""Two processes that generate text at the same time with all threads each, against one after the other.

1.0 is a machine that loses nothing to the switching between them. A process does not know of the other, so that threads
which wait for each other by spinning take the processors from those that they wait for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from engine_rounds import Engine, EngineSpec
from engines import SHAPES
from generate import OURS_INT4, OURS_W8A8, STOCK_BF16
from machine import describe
from rounds import write_json
from tqdm import tqdm

ENGINES = {"ours, INT4": OURS_INT4, "ours, W8A8": OURS_W8A8, "transformers, bfloat16": STOCK_BF16}
TASKS = {"decode": (16, 64), "prefill": (128, 2)}  # tokens of the prompt, and new ones


def seconds(engines: list[Engine], prompt: int, new_tokens: int, together: bool) -> float:
    """Of a generation by each engine."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(engines) if together else 1) as pool:
        list(pool.map(lambda e: e.ask("generate", prompt=prompt, new_tokens=new_tokens, seed=0), engines))
    return time.perf_counter() - start


def measure(spec: EngineSpec, shape: str, rounds: int, threads: int) -> list[dict]:
    """A record for each task."""
    options = {"shape": vars(SHAPES[shape]), "threads": threads, **spec.options}
    engines = [Engine(replace(spec, name=f"{spec.name} {i}"), shape, options) for i in range(2)]
    records = []
    try:
        for task, (prompt, new_tokens) in TASKS.items():
            alone, together = [], []
            for number in range(rounds + 1):
                one, both = (seconds(engines, prompt, new_tokens, at_once) for at_once in (False, True))
                if number > 0:  # the first round warms up
                    alone.append(one)
                    together.append(both)
            ratio = statistics.median(b / a for a, b in zip(alone, together, strict=True))
            medians = {"one_by_one": statistics.median(alone), "together": statistics.median(together)}
            records.append({"engine": spec.name, "shape": shape, "task": task, **medians, "ratio": ratio})
    finally:
        for engine in engines:
            engine.close()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ours, INT4", "ours, W8A8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    machine = describe(args.threads)
    records = []
    for name in tqdm(args.engines, desc="engines"):
        records += measure(ENGINES[name], args.shape, args.rounds, args.threads)
    for r in records:
        print(
            f"{r['engine']:24s} {r['task']:8s} one by one {r['one_by_one']:6.2f} s, together {r['together']:6.2f} s:"
            f" {r['ratio']:.2f}"
        )
    if args.json:
        write_json(args.json, {"machine": machine, "contention": records})


if __name__ == "__main__":
    main()
