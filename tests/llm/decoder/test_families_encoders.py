"""Families with an encoder, such as T5, Whisper and Bart."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import ipex_quant as ipex
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.decoder.families import FAMILIES
from ipex_quant.llm.decoder.layer import FusedLayer, fuse_decoder
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from ..conftest import random_model

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
T5 = {**TOKENS, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 4}
WHISPER = {
    **TOKENS,
    "bos_token_id": 1,
    "num_mel_bins": 8,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_source_positions": 12,
    "max_target_positions": 32,
}
BART = {
    **TOKENS,
    "bos_token_id": 1,
    "forced_eos_token_id": None,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 32,
}
MODELS = {
    "t5": (transformers.T5ForConditionalGeneration, T5),
    "t5-gated": (transformers.T5ForConditionalGeneration, {**T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": (transformers.MT5ForConditionalGeneration, T5),
    "whisper": (transformers.WhisperForConditionalGeneration, WHISPER),
    "bart": (transformers.BartForConditionalGeneration, BART),
    "marian": (transformers.MarianMTModel, {**BART, "activation_function": "silu", "decoder_vocab_size": 96}),
    "m2m-100": (transformers.M2M100ForConditionalGeneration, BART),
    "mbart": (transformers.MBartForConditionalGeneration, BART),
    "pegasus": (transformers.PegasusForConditionalGeneration, BART),
}


def build(name):
    return random_model(*MODELS[name])


def fused(stock):
    model = copy.deepcopy(stock)
    assert len(fuse_decoder(model)) == 4, "every layer of encoder and decoder is fused"
    return model


def inputs(name):
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 24, generator=generator)}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(3, 96, (2, 7), generator=generator), "attention_mask": mask}


def steps(model, name):
    """Logits of a prompt of the decoder, then of two more tokens in one step, then of one."""
    tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    given = inputs(name)
    encoded = model.get_encoder()(**given)
    options = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    return torch.cat(
        [
            model(
                encoder_outputs=encoded,
                decoder_input_ids=tokens[:, start:end],
                **{CACHE: cache},
                use_cache=True,
                **options,
            ).logits
            for start, end in ((0, 5), (5, 7), (7, 8))
        ],
        dim=1,
    )


@pytest.fixture(autouse=True)
def _no_stock_layers(monkeypatch):
    def fail(layer, *args, **kwargs):
        pytest.fail(f"{layer.module} ran stock code")

    monkeypatch.setattr(FusedLayer, "call_stock", fail)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_stock_model(name, implementation):
    stock = build(name)
    stock.set_attn_implementation(implementation)

    torch.testing.assert_close(steps(fused(stock), name), steps(stock, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_quantized_layers_compute_what_they_do_in_the_stock_model(name):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32)
    stock = ipex.llm.optimize(build(name), quantization_config=mapping, inplace=True)

    torch.testing.assert_close(steps(fused(stock), name), steps(stock, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_stock_model(name, beams):
    stock = build(name)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}

    expected = stock.generate(**inputs(name), **options)

    assert torch.equal(fused(stock).generate(**inputs(name), **options), expected)


def test_every_family_is_tested():
    layers = {type(module).__name__ for name in MODELS for module in build(name).modules()}

    assert layers >= {name for name, ways in FAMILIES.items() if any(way.cross for way in ways)}


@pytest.mark.parametrize("kept", [None, torch.float32])
def test_float16_runs_the_stock_layers_which_clamp(monkeypatch, kept):
    monkeypatch.undo()
    stock = build("t5").to(torch.float16)
    for module in stock.modules():  # transformers keeps them in float32, and with them what a layer returns
        if hasattr(module, "wo") and kept:
            module.wo.to(kept)
    model = copy.deepcopy(stock)
    fuse_decoder(model)

    assert torch.equal(steps(model, "t5"), steps(stock, "t5"))
