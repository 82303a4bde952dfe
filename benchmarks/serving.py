"""Many requests at once: batched decoding, continuous batching and vLLM, beside llama.cpp and vLLM alone, in one run.

All engines run a Llama of the same shape with random weights, on the same number of threads, each in a process of its
own. A round runs every engine once on every task; ratios are taken within a round, and the figures are medians over the
rounds. Engines of vLLM time decoding as the difference of a long and a short generation.

- decode: tokens a second of so many sequences that decode together, after a short prompt.
- requests: new tokens a second of requests with prompts of 64 to 512 tokens, all there at once, from the start on.
- prefill: prompt tokens a second of one request.
- stall: eight sequences decode when a prompt of 2048 tokens comes; the longest pause of theirs, in steps of 512 tokens.
- lookup: tokens a second where the answer quotes the prompt, with prompt lookup and without (SmolLM2-135M).
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from engine_rounds import Engine, EngineError, EngineSpec
from engines import SHAPES
from gguf_files import model_file
from machine import Limits, describe
from rounds import write_json
from tqdm import tqdm

OURS, VLLM = "engine_serving.py", "engine_vllm.py"
LLAMACPP = {"script": "engine_llamacpp.py", "environment": "llamacpp"}
GPTQ = {"environment": "vllm", "file": "{shape}-gptq"}
OURS_INT4 = EngineSpec("ours, INT4", OURS, {"weights": "int4"})
ENGINES = [
    OURS_INT4,
    EngineSpec("ours, W8A8", OURS, {"weights": "w8a8"}),
    EngineSpec("vLLM with ours, INT4", VLLM, {"plugin": True}, **GPTQ),
    EngineSpec("vLLM, INT4", VLLM, {"plugin": False}, **GPTQ),
    EngineSpec("vLLM, bfloat16", VLLM, {"plugin": False}, environment="vllm", file="{shape}-bf16"),
    EngineSpec("llama.cpp, Q4_0", options={"weights_type": "Q4_0"}, file="{shape}-Q4_0.gguf", **LLAMACPP),
]
BATCHES = (1, 8, 32, 64)
SLOTS = 32
QUOTING = "SmolLM2-135M Q4_1"


def lengths(count: int, seed: int) -> list[int]:
    """Lengths of prompts."""
    generator = random.Random(seed)
    return [generator.randint(64, 512) for _ in range(count)]


def tasks(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any], int]]:
    """The method of the engines, its arguments, and the tokens that it makes, by the names of tasks."""
    found: dict[str, tuple[str, dict[str, Any], int]] = {}
    if "decode" in args.tasks:
        for batch in BATCHES:
            found[f"decode {batch}"] = "decode", {"batch": batch, "prompt": 32, "new_tokens": args.steps}, batch
    if "requests" in args.tasks:
        options = {"lengths": lengths(SLOTS, 0), "new_tokens": args.new_tokens}
        found[f"{SLOTS} requests"] = "requests", options, SLOTS * args.new_tokens
    if "prefill" in args.tasks:
        found["prefill 512"] = "requests", {"lengths": [512], "new_tokens": 1}, 512
    return found


def measure(specs: list[EngineSpec], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each task and engine; an engine that fails has an "error"."""
    seconds: dict[tuple[str, str], list[float]] = {}
    about: dict[str, dict[str, Any]] = {}
    todo = tasks(args)
    for number in tqdm(range(args.rounds), desc="rounds"):
        for spec in specs:  # one model in memory at a time
            if "error" in about.get(spec.name, {}):
                continue
            try:
                engine = start(spec, args.shape, args.threads)
                about[spec.name] = engine.about
                for name, (method, options, _) in todo.items():
                    taken = engine.ask(method, seed=number, **options)["seconds"]
                    seconds.setdefault((name, spec.name), []).append(taken)
                about[spec.name]["peak_bytes"] = engine.memory["peak"]
                engine.close()
            except EngineError as error:
                about[spec.name] = {"error": str(error)}
    records = []
    for name, (_, _, tokens) in todo.items():
        first = seconds.get((name, specs[0].name), [])
        for spec in specs:
            own = seconds.get((name, spec.name), [])
            record = {"shape": args.shape, "task": name, "engine": spec.name, **about.get(spec.name, {})}
            if "error" not in record:
                record["tokens_per_second"] = tokens / statistics.median(own)
                record["first_over_this"] = statistics.median(o / f for o, f in zip(own, first, strict=False))
                alone = seconds.get(("decode 1", spec.name))
                if name.startswith("decode") and alone:
                    record["over_one"] = statistics.median(tokens * a / o for a, o in zip(alone, own, strict=True))
                record["seconds"] = own
            records.append(record)
    return records


def start(spec: EngineSpec, shape: str, threads: int) -> Engine:
    """A running engine, whose model file is written first."""
    options = {"shape": vars(SHAPES[shape]), "threads": threads, **spec.options}
    if spec.file is None:
        return Engine(spec, shape, options)
    path = Path(__file__).resolve().parents[1] / "build" / "peers" / "models" / spec.file.format(shape=shape)
    options["path"] = str(path)
    writer = EngineSpec(spec.name, OURS, spec.options) if spec.script == VLLM else spec
    Engine(writer, shape, options | {"prepare": True}).close()
    return Engine(spec, shape, options)


def extra(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The tasks that are measured with this package alone."""
    records = []
    own: dict[str, dict[str, Any]] = {"stall": {"weights": "int4"}}
    if args.packages is not None:
        own["lookup"] = {"path": str(model_file(QUOTING, args.packages))}
    for task, options in own.items():
        if task not in args.tasks:
            continue
        shape = args.shape if task == "stall" else QUOTING
        spec = EngineSpec(f"ours, {task}", OURS, options)
        sizes = {"shape": vars(SHAPES[shape])} if shape in SHAPES else {"shape": None}
        try:
            engine = Engine(spec, shape, {**sizes, "threads": args.threads, **options})
            found = [engine.ask(task, seed=number) for number in range(args.rounds)]
            engine.close()
        except EngineError as error:
            records.append({"shape": shape, "task": task, "engine": spec.name, "error": str(error)})
            continue
        values = {name: statistics.median(each[name] for each in found) for name in found[0]}
        records.append({"shape": shape, "task": task, "engine": "ours", **values, "samples": found})
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    for task in dict.fromkeys(r["task"] for r in records):
        print(f"\n{task}")
        for r in (r for r in records if r["task"] == task):
            if "error" in r:
                print(f"  {r.get('engine', ''):24s} failed: {r['error']}")
            elif "tokens_per_second" in r:
                over = f"{r['over_one']:8.2f}x of one" if "over_one" in r else ""
                rate = f"{r['tokens_per_second']:9.1f} token/s{r['first_over_this']:7.2f}x 1st/this"
                print(f"  {r['engine']:24s}{rate}{over}")
            else:
                print("  " + ", ".join(f"{k} {v:.4g}" for k, v in r.items() if isinstance(v, float)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    parser.add_argument("--engines", nargs="+", choices=[e.name for e in ENGINES], help="all, if not given")
    names = ["decode", "requests", "prefill", "stall", "lookup"]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=16, help="of decoding")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packages", type=Path, help="where the package of SmolLM2 is installed, for lookup")
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()

    machine = describe(args.threads, dtype="bfloat16", **Limits(args.threads).best())
    chosen = [e for e in ENGINES if args.engines is None or e.name in args.engines]
    records = [*(measure(chosen, args) if tasks(args) else []), *extra(args)]
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "serving": records})


if __name__ == "__main__":
    main()
