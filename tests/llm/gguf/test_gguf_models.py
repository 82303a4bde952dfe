"""GGUF files of every architecture compute what the model does that they were made of."""

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.nn import QuantizedModule

VARIANTS = {"llama-tied": "llama", "mixtral": "llama", "falcon-7b": "falcon"}
"""Variants of an architecture, by their name in `names.json`."""

NAMES = (
    *("bloom", "falcon", "falcon-7b", "gemma", "gemma2", "gemma3", "gpt-oss", "gpt2", "lfm2", "llama", "llama-tied"),
    *(
        "mamba",
        "minimax-m2",
        "mixtral",
        "nemotron",
        "phi3",
        "qwen2",
        "qwen2moe",
        "qwen3",
        "qwen3moe",
        "qwen35",
        "qwen35moe",
        "stablelm",
    ),
    *("starcoder2", "t5"),
)


def logits_of(model):
    tokens = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return model(**inputs).logits


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt-oss"])
def test_floats(name, make_tiny, gguf_of):
    model = make_tiny(name)
    expected = logits_of(model)
    loaded = ipex.llm.from_pretrained(gguf_of(model, name, VARIANTS.get(name, name)), torch.float32)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_blocks(name, make_tiny, gguf_of):
    model, arch = make_tiny(name), VARIANTS.get(name, name)
    if name == "gpt-oss":  # floats of its experts are not read
        expected, error = logits_of(model), 0.05
    else:
        expected = logits_of(ipex.llm.from_pretrained(gguf_of(model, name, arch, "values"), torch.float32))
        error = 1e-4
    loaded = ipex.llm.from_pretrained(gguf_of(model, name, arch, "Q8_0"), torch.float32)
    kinds = {type(module).__name__ for module in loaded.modules() if isinstance(module, QuantizedModule)}
    assert "QuantizedEmbedding" in kinds
    assert len(kinds) > 1
    torch.testing.assert_close(logits_of(loaded), expected, rtol=error, atol=error * expected.abs().max().item())
