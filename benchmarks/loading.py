"""Loading a 4-bit checkpoint from a warm page cache: time, processor time and memory.

Each format is loaded in processes of its own, after its imports and a reading of its file; the table has the fastest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from engines import SHAPES
from machine import describe
from random_llama import random_llama

import ipex_quant as ipex
from ipex_quant import evaluation
from ipex_quant.llm.exporting import FORMATS
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.quantization import WoqWeightDtype, WoqWeightQScheme, get_weight_only_quant_qconfig_mapping

GROUP_SIZE = 128


def write_checkpoints(directory: Path, shape: str, formats: list[str]) -> None:
    """Write a random model in each format, with half scales, as other tools do, and its output layer in float."""
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, weight_qscheme=WoqWeightQScheme.SYMMETRIC, group_size=GROUP_SIZE
    )
    mapping.set_module_name("lm_head", None)
    model = random_llama(SHAPES[shape])
    model = ipex.llm.optimize(model, dtype=torch.bfloat16, quantization_config=mapping, inplace=True)
    for name, module in model.named_modules():
        if isinstance(module, WeightOnlyQuantizedLinear):
            weight = module.quantized_weight()
            weight = replace(weight, scales=weight.scales.half().float())
            model.set_submodule(name, type(module).from_quantized_weight(weight))
    for form in formats:
        ipex.llm.export(model, directory / form, form)


def load(directory: Path) -> dict[str, float]:
    """Load the checkpoint in `directory` once; bytes and seconds."""
    size = 0
    for file in (*directory.glob("*.safetensors"), *directory.glob("*.gguf")):
        size += len(file.read_bytes())
    transformers.AutoConfig.for_model("llama")
    torch.ones(512, 512) @ torch.ones(512, 512)
    before, peak, done = _own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _own_memory())

    threading.Thread(target=watch, daemon=True).start()
    used, start = _processor_seconds(), time.perf_counter()
    model = ipex.llm.from_pretrained(directory)
    seconds, used = time.perf_counter() - start, _processor_seconds() - used
    done.set()
    return {
        "seconds": seconds,
        "processor_seconds": used,
        "file_bytes": size,
        "model_bytes": evaluation.model_bytes(model),
        "peak_bytes": peak[0] - before,
    }


def _own_memory() -> int:
    """Bytes of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="llama-1.1b", choices=SHAPES)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.load:
        print(json.dumps(load(args.load)))
        return
    describe(args.threads)
    print(f"{'format':20} {'MB/s':>6} {'s':>6} {'cpu s':>6} {'file MB':>8} {'model MB':>9} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), args.shape, args.formats)
        for form in args.formats:
            command = [sys.executable, __file__, "--threads", f"{args.threads}", "--load", f"{folder}/{form}"]
            outputs = [subprocess.check_output(command, stderr=subprocess.DEVNULL) for _ in range(args.rounds)]
            best = min(map(json.loads, outputs), key=lambda each: each["seconds"])
            megabytes = {key: value / 1e6 for key, value in best.items()}
            print(
                f"{form:20} {megabytes['file_bytes'] / best['seconds']:6.0f} {best['seconds']:6.2f} "
                f"{best['processor_seconds']:6.2f} {megabytes['file_bytes']:8.0f} {megabytes['model_bytes']:9.0f} "
                f"{megabytes['peak_bytes']:8.0f}"
            )


if __name__ == "__main__":
    main()
