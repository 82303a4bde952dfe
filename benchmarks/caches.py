"""What INT8 key/value caches cost in accuracy, with the factors that take outlier channels out of keys and without.

Weights and activations stay in float32: the KL divergence is that of the caches alone. Models are those of accuracy.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accuracy import EMBEDDED, LENGTHS, load
from frontier_measure import Predictor
from machine import ROOT, describe
from real_models import MODEL as SMOLLM2
from real_models import float_directory
from rounds import write_json
from transformers import AutoTokenizer

from ipex_quant import data, evaluation, llm
from ipex_quant.llm.cache import layers


@contextmanager
def without_factors() -> Iterator[None]:
    """Keys are stored as they are inside the context."""
    before = layers.outlier_factors
    layers.outlier_factors = lambda *keys: torch.ones_like(before(*keys))
    try:
        yield
    finally:
        layers.outlier_factors = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LENGTHS, default=EMBEDDED)
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: what the embedded model has not seen")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, that are predicted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model-dir", type=Path, default=ROOT / "build" / "real-models" / SMOLLM2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = float_directory(options.model_dir) if options.model == SMOLLM2 else data.embedded_model_dir()
    machine = describe(options.threads, model=options.model, tokens=options.tokens)
    text = data.held_out_text() if options.text is None else options.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = Predictor(load(options.model, directory))
    model = llm.optimize(load(options.model, directory), dtype=torch.float32, kv_cache_dtype=torch.int8, inplace=True)
    found = {}

    def measure(title: str) -> None:
        result = evaluation.compare(reference, model, tokenizer, text, LENGTHS[options.model], options.tokens)
        change = result.perplexity / result.reference_perplexity - 1
        found[title] = {"kl": float(f"{result.kl_divergence:.4g}"), "change": round(change, 5)}
        print(
            f"{title:16s} KL {result.kl_divergence:<9.3g} perplexity {result.perplexity:.3f} ({change:+.2%})",
            flush=True,
        )

    measure("with factors")
    with without_factors():
        measure("without factors")
    if options.json is not None:
        write_json(options.json, {"machine": machine, "caches": found})


if __name__ == "__main__":
    main()
