"""What each process of a torchrun does with the models in a directory: it keeps its results, or the error."""

import os
import sys
from pathlib import Path

import torch
import transformers

import ipex_quant.llm


def load(directory):
    if directory.name == "int4":
        return transformers.AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")
    cache = torch.int8 if directory.name == "bfloat16" else None
    return ipex_quant.llm.from_pretrained(directory, tp_plan="auto", kv_cache_dtype=cache)


def results(directory, tokens):
    model = load(directory)
    with torch.inference_mode():
        found = {
            "logits": model(tokens).logits,
            "tokens": model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False),
        }
    layer = model.model.layers[1]
    found["linears"] = {
        name: (module.out_features, module.in_features, getattr(module, "bias", None) is not None)
        for name, module in layer.named_modules()
        if hasattr(module, "in_features")
    }
    found["fused"] = type(vars(layer).get("forward")).__name__
    return model, found


def refusals(model, tokens, directory):
    actions = {
        "save": lambda: ipex_quant.llm.save(model, directory / "saved"),
        "save_pretrained": lambda: model.save_pretrained(directory / "saved"),
        "export": lambda: ipex_quant.llm.export(model, directory / "exported", "gptq"),
        "dequantize": model.dequantize,
        "backward": lambda: model(tokens).logits.sum().backward(),
    }
    return {name: error_of(action) for name, action in actions.items()}


def error_of(action):
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(models, out):
    tokens = torch.load(out / "tokens.pt")
    found = {}
    for directory in sorted(models.iterdir()):
        try:
            model, found[directory.name] = results(directory, tokens)
        except ValueError as error:
            found[directory.name] = str(error)
            continue
        if directory.name == "int4":
            found["refusals"] = refusals(model, tokens, out)
    torch.save(found, out / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
