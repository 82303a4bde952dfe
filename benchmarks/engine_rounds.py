"""Comparing engines that generate text, in rounds; each engine runs in a persistent child process.

A round runs every engine once, with the machine's limits measured right before and after it (the higher counts), and
ratios are taken within a round. The first round warms up. The figures are medians over the others.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines import SHAPES
from machine import ROOT, Limits
from tqdm import tqdm

BUILD = ROOT / "build" / "peers"
SETTLE_SECONDS = 0.1
"""Pause before each request: threads of the previous engine may still be spinning."""


class EngineError(RuntimeError):
    """An engine could not start, or failed to answer."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine: its name in tables, the script that runs it, and its options.

    `environment` is a folder of `build/peers` that `make bench-peers` installs; None is the current environment. `file`
    is the model file that the script prepares for a shape, in `build/peers/models`.
    """

    name: str
    script: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None
    file: str | None = None

    def python(self) -> str:
        """Path of the engine's Python interpreter; raises EngineError if it is not installed."""
        if self.environment is None:
            return sys.executable
        folder = BUILD / self.environment
        if not (folder / ".stamp").exists():
            raise EngineError(f"not installed: {_last_error(BUILD / f'{self.environment}.log')}")
        return str(folder / "bin" / "python")


@dataclass(frozen=True)
class Task:
    """A generation that every engine runs in every round.

    With `gemm`, engines that can also time the model's linears alone.
    """

    prompt: int
    new_tokens: int
    beams: int = 1
    gemm: bool = False


class Engine:
    """A running child process (see engines.py); `about` describes it, `memory` is from its last answer."""

    def __init__(self, spec: EngineSpec, shape: str, options: dict[str, Any]) -> None:
        self.log = BUILD / "log" / f"{spec.name} {shape}.log".replace(" ", "_").replace(",", "")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        variables = {"OMP_NUM_THREADS": str(options["threads"]), "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [spec.python(), str(ROOT / "benchmarks" / spec.script), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | variables,
            )
        self.memory: dict[str, int] = {}
        self.about = self._answer(1800)
        self.about["loading_peak_bytes"] = self.memory["peak"]

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call `method` of the engine and return its result; raises EngineError if it fails."""
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer(900)

    def _answer(self, limit: float) -> dict[str, Any]:
        ready = select.select([self.process.stdout], [], [], limit)[0]
        line = self.process.stdout.readline() if ready else ""
        reply = json.loads(line) if line else {}
        if "result" in reply:
            self.memory = reply["memory"]
            return reply["result"]
        self.close()
        if not ready:
            raise EngineError(f"no answer in {limit:.0f} s")
        raise EngineError(reply.get("error") or f"exit status {self.process.returncode}: {_last_error(self.log)}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"{log} is missing or empty"])[-1][:200]


def measure(
    specs: Sequence[EngineSpec], shape: str, tasks: Sequence[Task], rounds: int, threads: int, limits: Limits
) -> list[dict[str, Any]]:
    """One record for each task and engine, compared with the first engine; that of a failed engine has an "error"."""
    engines: dict[str, Engine] = {}
    about: dict[str, dict[str, Any]] = {}
    samples: dict[tuple[Task, str], list[dict[str, float]]] = {}
    for spec in tqdm(specs, desc=f"{shape}: loading"):
        try:
            engines[spec.name] = _start(spec, shape, threads)
            about[spec.name] = engines[spec.name].about
        except EngineError as error:
            about[spec.name] = {"error": str(error)}
    turns = [(number, task) for number in range(rounds + 1) for task in tasks]
    try:
        for number, task in tqdm(turns, desc=f"{shape}: rounds"):
            for name in list(engines):
                try:
                    sample = _ask(engines[name], task, number, limits)
                except EngineError as error:
                    about[name] = {"error": str(error)}
                    del engines[name]
                    continue
                about[name] |= {f"{kind}_bytes": size for kind, size in engines[name].memory.items()}
                if number > 0:
                    samples.setdefault((task, name), []).append(sample)
    finally:
        for engine in engines.values():
            engine.close()
    records = []
    for task in tasks:
        first = samples.get((task, specs[0].name), [])
        for spec in specs:
            record = {"shape": shape, "engine": spec.name, **asdict(task), **about[spec.name]}
            if "error" not in record:
                record |= _summary(record, samples[task, spec.name], first)
            records.append(record)
    return records


def _start(spec: EngineSpec, shape: str, threads: int) -> Engine:
    sizes = SHAPES.get(shape)
    options = {"shape": sizes and asdict(sizes), "threads": threads, **spec.options}
    if spec.file is not None:
        options["path"] = str(BUILD / "models" / spec.file.format(shape=shape))
        Engine(spec, shape, options | {"prepare": True}).close()
    return Engine(spec, shape, options)


def _ask(engine: Engine, task: Task, seed: int, limits: Limits) -> dict[str, float]:
    """Seconds of one generation, and the machine's limits measured before and after it."""
    time.sleep(SETTLE_SECONDS)
    before = limits.measure()
    beams = {"beams": task.beams} if task.beams > 1 else {}
    sample = engine.ask("generate", prompt=task.prompt, new_tokens=task.new_tokens, seed=seed, **beams)
    if task.gemm and engine.about.get("times_gemm"):
        alone = engine.ask("gemm", prompt=task.prompt)
        sample |= {f"{phase}_gemm": seconds for phase, seconds in alone.items()}
    after = limits.measure()
    bandwidth, int8_rate = map(max, before, after)
    return sample | {"bandwidth": bandwidth, "int8_rate": int8_rate}


def _summary(record: dict[str, Any], samples: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Rates, shares of the limits, and speed of the first engine relative to this one, from all rounds' samples."""

    def median(value: Any) -> float:
        return statistics.median(value(sample) for sample in samples)

    tokens = {"prefill": record["prompt"], "decode": 1, "total": record["new_tokens"]}
    phases = [phase for phase in tokens if phase in samples[0]]
    result: dict[str, Any] = {
        f"{phase}_tokens_per_second": tokens[phase] / median(lambda s, phase=phase: s[phase]) for phase in phases
    }
    if "decode" in phases and "linear_bytes" in record:
        result["decode_of_bandwidth"] = median(lambda s: record["linear_bytes"] / s["decode"] / s["bandwidth"])
    if "prefill" in phases and record["shape"] in SHAPES:
        shape = SHAPES[record["shape"]]
        operations = 2 * (record["prompt"] * shape.layers * shape.layer_weights + shape.hidden * shape.vocabulary)
        result["prefill_of_int8_peak"] = median(lambda s: operations / s["prefill"] / s["int8_rate"])
    for phase in phases:
        if f"{phase}_gemm" in samples[0]:
            result[f"{phase}_outside_gemm"] = median(lambda s, phase=phase: 1 - s[f"{phase}_gemm"] / s[phase])
        pairs = list(zip(samples, first, strict=False))
        if pairs:
            result[f"{phase}_first_over_this"] = statistics.median(s[phase] / f[phase] for s, f in pairs)
    return result | {"samples": samples}


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Print a table for each shape and task, with a line for each engine, without values that were not measured."""
    columns = {
        "prefill": ("prefill_tokens_per_second", "{:.1f}"),
        "decode": ("decode_tokens_per_second", "{:.2f}"),
        "token/s": ("total_tokens_per_second", "{:.2f}"),
        "1st/prefill": ("prefill_first_over_this", "{:.2f}x"),
        "1st/decode": ("decode_first_over_this", "{:.2f}x"),
        "1st/total": ("total_first_over_this", "{:.2f}x"),
        "of INT8 peak": ("prefill_of_int8_peak", "{:.2f}"),
        "of bandwidth": ("decode_of_bandwidth", "{:.2f}"),
        "non-GEMM prefill": ("prefill_outside_gemm", "{:.0%}"),
        "non-GEMM decode": ("decode_outside_gemm", "{:.0%}"),
    }

    def task(r: dict[str, Any]) -> tuple:
        return r["shape"], r["prompt"], r["new_tokens"], r["beams"]

    for shape, prompt, new_tokens, beams in dict.fromkeys(map(task, records)):
        own = [r for r in records if task(r) == (shape, prompt, new_tokens, beams)]
        used = {title: column for title, column in columns.items() if any(column[0] in r for r in own)}
        print(f"\n{shape}, prompt {prompt} + {new_tokens} tokens" + (f", {beams} beams" if beams > 1 else ""))
        print(f"{'':34s}" + "".join(f"{title:>18s}" for title in used) + f"{'weights GB':>12s}{'peak GB':>10s}")
        for r in own:
            if "error" in r:
                print(f"{r['engine']:34s}  failed: {r['error']}")
                continue
            cells = [form.format(r[key]) if key in r else "" for key, form in used.values()]
            sizes = f"{r['weight_bytes'] / 1e9:>12.2f}{r['peak_bytes'] / 1e9:>10.2f}"
            print(f"{r['engine']:34s}" + "".join(f"{cell:>18s}" for cell in cells) + sizes)
