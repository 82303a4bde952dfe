"""GGUF files of every architecture compute what the model does that they were made of."""

import pytest
import torch
import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

import ipex_quant as ipex
from ipex_quant.checkpoints import open_gguf
from ipex_quant.checkpoints.gguf_names import ARCHITECTURES
from ipex_quant.nn import QuantizedModule, WeightOnlyQuantizedLinear
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

VARIANTS = {"llama-tied": "llama", "mixtral": "llama", "falcon-7b": "falcon", "gemma4-experts": "gemma4"}
"""Variants of an architecture, by their name in `names.json`."""

NAMES = (
    *(
        "bloom",
        "falcon",
        "falcon-7b",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma4",
        "gemma4-experts",
        "gpt-oss",
        "gpt2",
        "lfm2",
        "llama",
        "llama-tied",
    ),
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


@pytest.mark.parametrize("name", NAMES)
def test_floats(name, make_tiny, gguf_of):
    model = make_tiny(name)
    expected = logits_of(model)
    loaded = ipex.llm.from_pretrained(gguf_of(model, name, VARIANTS.get(name, name)), torch.float32)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_blocks(name, make_tiny, gguf_of):
    model, arch = make_tiny(name), VARIANTS.get(name, name)
    expected = logits_of(ipex.llm.from_pretrained(gguf_of(model, name, arch, "values"), torch.float32))
    error = 1e-4
    loaded = ipex.llm.from_pretrained(gguf_of(model, name, arch, "Q8_0"), torch.float32)
    kinds = {type(module).__name__ for module in loaded.modules() if isinstance(module, QuantizedModule)}
    assert "QuantizedEmbedding" in kinds
    assert len(kinds) > 1
    torch.testing.assert_close(logits_of(loaded), expected, rtol=error, atol=error * expected.abs().max().item())


def test_an_encoder_alone(make_tiny, gguf_of):
    whole = make_tiny("t5")
    model = transformers.T5EncoderModel(whole.config).eval()
    model.load_state_dict(
        {name: t for name, t in whole.state_dict().items() if not name.startswith(("decoder", "lm_"))}
    )
    tokens = torch.arange(3, 20)[None]
    loaded = ipex.llm.from_pretrained(gguf_of(model, "t5", "t5encoder"), torch.float32)
    assert type(loaded) is transformers.T5EncoderModel
    expected = model(tokens).last_hidden_state
    torch.testing.assert_close(loaded(tokens).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_model_in_parts(make_tiny, gguf_of, write_gguf, tmp_path, kind):
    file = open_gguf(gguf_of(make_tiny("qwen2"), "qwen2", "qwen2", kind))
    tensors = {
        name: (tensor.kind, tensor.stored[...]) if tensor.kind else tensor.stored[...]
        for name, tensor in file.tensors.items()
    }
    names = list(tensors)
    for number, own in enumerate((names[:7], names[7:])):
        metadata = (file.metadata if number == 0 else {}) | {"split.no": number, "split.count": 2}
        metadata |= {"split.tensors.count": len(names)}
        write_gguf(tmp_path / f"parts-{number + 1:05d}-of-00002.gguf", metadata, {name: tensors[name] for name in own})
    expected = logits_of(ipex.llm.from_pretrained(file.path, torch.float32))
    parts = ipex.llm.from_pretrained(tmp_path / "parts-00002-of-00002.gguf", torch.float32)
    assert torch.equal(logits_of(parts), expected)


def test_floats_are_quantized_as_asked(make_tiny, gguf_of):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    path = gguf_of(make_tiny("llama"), "llama", "llama")
    model = ipex.llm.from_pretrained(path, torch.float32, mapping)
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, WeightOnlyQuantizedLinear)
    expected = ipex.llm.optimize(make_tiny("llama"), quantization_config=mapping)
    torch.testing.assert_close(logits_of(model), logits_of(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma4", "gemma4-experts"])
def test_gemma_4_generates(name, make_tiny, gguf_of):
    model = make_tiny(name)
    loaded = ipex.llm.from_pretrained(gguf_of(model, name, "gemma4"), torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = torch.arange(3, 15).view(2, 6)
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


def test_layers_that_share_keys_and_values_may_have_their_own_in_the_file(make_tiny, gguf_of, write_gguf, blocks_of):
    model = make_tiny("gemma4")
    path = gguf_of(model, "gemma4", "gemma4", "Q8_0")
    file = open_gguf(path)
    tensors = {
        name: (tensor.kind, tensor.stored[...]) if tensor.kind else tensor.stored[...]
        for name, tensor in file.tensors.items()
    }
    unused = {"blk.5.attn_k.weight": blocks_of(torch.ones(64, 64))[0], "blk.5.attn_k_norm.weight": torch.ones(32)}
    loaded = ipex.llm.from_pretrained(path, torch.float32)
    again = ipex.llm.from_pretrained(
        write_gguf(path.with_name("m.gguf"), file.metadata, tensors | unused), torch.float32
    )
    assert torch.equal(logits_of(again), logits_of(loaded))


def test_a_float_model_is_saved_as_one(make_tiny, gguf_of, tmp_path):
    loaded = ipex.llm.from_pretrained(gguf_of(make_tiny("gpt-oss"), "gpt-oss", "gpt-oss"), torch.float32)
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(again), logits_of(loaded), rtol=1e-4, atol=1e-4)


def test_every_architecture_that_transformers_maps_is_read():
    names = {"mistral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "umt5": "t5"}
    names["minimax_m2"] = "minimax-m2"
    mapped = {names.get(name, name) for name in GGUF_CONFIG_MAPPING} - {"general", "tokenizer"}
    newer = pytest.importorskip("transformers.integrations.gguf")
    assert mapped | {*newer.GGUF_CONFIG_ARCHS} <= {*ARCHITECTURES}
