"""4-bit checkpoints here and in the CPU runtimes of their producers, GPTQModel and auto-round, in one run.

One random Llama in GPTQ's layout is written once, to `build/peers/models`, with the configuration of either producer.
Loading is timed first, in rounds of new processes with the files in the page cache, until the model is there and until
the first token of an answer: some packages put off a part of the work till then. Memory is the peak of a process minus
what it held before. `engine_rounds.py` documents how generation is measured. The first round of both
warms up: GPTQModel compiles its kernels then, for minutes on a machine that has not done so yet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from engine_rounds import BUILD, Engine, EngineError, EngineSpec, Task, measure, print_table
from engines import SHAPES
from loading import write_checkpoints
from machine import Limits, describe
from rounds import write_json
from tqdm import tqdm

CHECKPOINTS = {"GPTQ": "gptqmodel", "auto-round": "auto-round"}
"""Packages that run the checkpoints, by the checkpoint's format."""

AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "data_type": "int",
    "provider": "auto-round",
    "autoround_version": "0.16.1",
}
"""What auto-round's configuration has beside the entries that it shares with GPTQ's."""

SHARED = ("bits", "group_size", "sym")
LOADING = ("loading_seconds", "loading_peak_bytes", "answer_seconds", "answer_peak_bytes")


def write_models(shape: str) -> dict[str, Path]:
    """The directories of the checkpoints of a shape, which are written if they are not there."""
    paths = {name: BUILD / "models" / f"{shape}-{name}" for name in CHECKPOINTS}
    if all(path.is_dir() for path in paths.values()):
        return paths
    parent = BUILD / "models"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        write_checkpoints(Path(folder), shape, ["gptq"])
        gptq, auto_round = Path(folder) / "gptq", Path(folder) / "auto-round"
        shutil.copytree(gptq, auto_round, ignore=shutil.ignore_patterns("quantize_config.json"))
        config = json.loads((gptq / "config.json").read_text(encoding="utf-8"))
        stored = config["quantization_config"]
        config["quantization_config"] = AUTO_ROUND | {key: stored[key] for key in SHARED}
        (auto_round / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for path, written in zip(paths.values(), (gptq, auto_round), strict=True):
            shutil.rmtree(path, ignore_errors=True)
            written.rename(path)
    return paths


def specs(name: str, path: Path) -> list[EngineSpec]:
    """The engines that run a checkpoint, ours first."""
    options = {"path": str(path)}
    package = CHECKPOINTS[name]
    return [
        EngineSpec("ours, int8", "engine_torch.py", options | {"lowp_mode": "INT8"}),
        EngineSpec("ours, bfloat16", "engine_torch.py", options | {"lowp_mode": "NONE"}),
        EngineSpec(package, "engine_producers.py", options | {"package": package}, "checkpoints"),
    ]


def loadings(
    engines: Sequence[EngineSpec], shape: str, path: Path, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Medians of `LOADING` by engine, and how many times as fast the first is; nothing for an engine that fails.

    An answer is the first token after a prompt of 16.
    """
    samples: dict[str, list[dict[str, float]]] = {spec.name: [] for spec in engines}
    turns = [(number, spec) for number in range(rounds + 1) for spec in engines]
    for number, spec in tqdm(turns, desc=f"{path.name}: loading"):
        for file in path.glob("*.safetensors"):
            file.read_bytes()  # into the page cache
        try:
            engine = Engine(spec, shape, {"shape": vars(SHAPES[shape]), "threads": threads, **spec.options})
            answer = engine.ask("generate", prompt=16, new_tokens=2, seed=number)
        except EngineError:
            continue  # `measure` reports it
        engine.close()
        about = engine.about | {
            "answer_seconds": engine.about["loading_seconds"] + answer["prefill"],
            "answer_peak_bytes": engine.memory["peak"],
        }
        if number > 0:
            samples[spec.name].append({key: about[key] for key in LOADING})
    first = samples[engines[0].name]
    found = {}
    for name, own in samples.items():
        if len(own) == len(first) == rounds:
            found[name] = {key: statistics.median(sample[key] for sample in own) for key in LOADING}
            for what in ("loading", "answer"):
                ratios = [s[f"{what}_seconds"] / f[f"{what}_seconds"] for s, f in zip(own, first, strict=True)]
                found[name][f"{what}_first_over_this"] = statistics.median(ratios)
            found[name]["loading_samples"] = own
    return found


def print_loading(records: Sequence[dict[str, Any]]) -> None:
    """Print a line for each engine: how it loads, and in which linear layers it computes."""
    titles = "".join(f"{title:>12s}{'1st/this':>10s}{'peak GB':>10s}" for title in ("seconds", "to answer s"))
    print(f"\n{'loading':34s}{titles}  linear layers")
    for r in records:
        if "loading_first_over_this" in r:
            numbers = ""
            for what in ("loading", "answer"):
                seconds, ratio, peak = (r[f"{what}_{key}"] for key in ("seconds", "first_over_this", "peak_bytes"))
                numbers += f"{seconds:>12.2f}{ratio:>9.2f}x{peak / 1e9:>10.2f}"
            print(f"{r['engine']:34s}{numbers}  {r.get('kernel', '')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loading-rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    paths = write_models(args.shape)
    limits = Limits(args.threads)
    machine = describe(args.threads, dtype="bfloat16", **limits.best())
    task = Task(args.prompt, args.new_tokens)
    records = []
    for name in args.checkpoints:
        engines = specs(name, paths[name])
        loading = loadings(engines, args.shape, paths[name], args.loading_rounds, args.threads)
        measured = measure(engines, args.shape, [task], args.rounds, args.threads, limits)
        label = {"shape": f"{args.shape}, {name}"}
        own = [record | loading.get(record["engine"], {}) | label for record in measured]
        print_loading(own)
        print_table(own)
        records += own
    if args.json:
        write_json(args.json, {"machine": machine, "generate": records})


if __name__ == "__main__":
    main()
