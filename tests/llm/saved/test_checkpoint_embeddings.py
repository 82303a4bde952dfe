"""Embeddings that a checkpoint holds quantized."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.checkpoints import WeightsInMemory
from ipex_quant.llm.saved.checkpoint_embeddings import embeddings_from_checkpoint
from ipex_quant.nn import QuantizedEmbedding
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

SCHEME = WeightScheme(WoqWeightDtype.INT8, True, 32)


def weights_of(model, *names):
    return {name: affine.quantize(model.get_submodule(name).weight, SCHEME) for name in names}


def optimized(model, weights, **options):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, **options)
    return ipex.llm.optimize(model, quantization_config=mapping, low_precision_checkpoint=weights)


def test_a_tied_output_layer_shares_the_weight(make_model, logits, tmp_path):
    model = make_model("llama_tied")
    weights = weights_of(model, "model.embed_tokens", "model.layers.0.mlp.up_proj")
    loaded = optimized(model, weights, lowp_mode=WoqLowpMode.BF16)
    assert isinstance(loaded.model.embed_tokens, QuantizedEmbedding)
    assert loaded.model.embed_tokens.table is loaded.lm_head
    assert loaded.model.embed_tokens.nbytes == 0
    assert loaded.lm_head.lowp_mode == WoqLowpMode.BF16
    ipex.llm.save(loaded, tmp_path)
    again = ipex.llm.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(loaded))
    assert again.model.embed_tokens.table is again.lm_head


class SlowWeights(WeightsInMemory):
    """Weights that take long enough to read for two threads to ask for one."""

    def quantized_weight(self, *args):
        time.sleep(0.05)
        return super().quantized_weight(*args)


@pytest.mark.parametrize("first", ["model.embed_tokens", "lm_head"])
def test_a_weight_is_read_once_though_its_layers_are_made_at_a_time(make_model, first):
    model = make_model("llama_tied")
    weights = SlowWeights(weights_of(model, "model.embed_tokens"))
    qconfig = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4).global_qconfig
    makers = embeddings_from_checkpoint(model, weights, {"lm_head": qconfig}, {"model.embed_tokens"})
    names = sorted(makers, key=lambda name: name != first)
    with ThreadPoolExecutor(2) as workers:
        made = dict(zip(names, workers.map(lambda name: makers[name](model.get_submodule(name)), names), strict=True))
    assert made["model.embed_tokens"].table is made["lm_head"]
    assert made["model.embed_tokens"].tied


def test_one_alone_leaves_the_output_layer(make_model, logits):
    model = make_model("llama")
    weights = weights_of(model, "model.embed_tokens")
    loaded = optimized(model, weights)
    assert isinstance(loaded.model.embed_tokens, QuantizedEmbedding)
    assert type(loaded.lm_head) is nn.Linear
    model.model.embed_tokens.weight.copy_(affine.dequantize(weights["model.embed_tokens"]))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_embeddings_that_share_a_table(make_model):
    model = make_model("t5")
    loaded = optimized(model, weights_of(model, "shared"))
    tables = {id(module.table) for module in loaded.modules() if isinstance(module, QuantizedEmbedding)}
    assert len(tables) == 1
    assert [loaded.shared.tied, loaded.encoder.embed_tokens.tied, loaded.decoder.embed_tokens.tied].count(False) <= 1


def test_embeddings_that_cannot_be_quantized(make_model):
    model = make_model("llama")
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match=r"model\.embed_tokens is quantized in it, and cannot be here: it changes"):
        optimized(model, weights_of(model, "model.embed_tokens"))
