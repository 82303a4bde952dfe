import copy
import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import ipex_quant as ipex
from ipex_quant.frontend.casting import cast_for_inference


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.conv, self.bn = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.lstm, self.gru = nn.LSTM(4, 4), nn.GRU(4, 4)
        self.head.weight = self.embedding.weight
        self.own = nn.Parameter(torch.ones(4))


def test_layers_are_cast_and_norms_and_own_parameters_are_not():
    model = Net().eval()
    cast_for_inference(model, torch.bfloat16)
    cast = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    kept = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert cast == {"embedding", "conv", "lstm"}
    assert kept == {"norm", "bn", "gru", "own"}
    assert model.head.weight is model.embedding.weight


def test_a_module_that_shares_a_parameter_with_one_that_is_not_cast_stays_whole():
    model = nn.Module()
    model.shared = nn.Parameter(torch.rand(3, 3))
    model.first, model.second = nn.Linear(3, 3), nn.Linear(3, 3)
    model.first.weight = model.shared
    model.second.bias = model.first.bias
    model.third = nn.Linear(3, 3)
    cast_for_inference(model, torch.float16)
    assert {p.dtype for p in (*model.first.parameters(), *model.second.parameters())} == {torch.float32}
    assert {p.dtype for p in model.third.parameters()} == {torch.float16}


def test_a_head_that_holds_the_bias_of_its_last_layer_is_cast():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    model = BertForMaskedLM(config).eval()
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    cast_for_inference(model, torch.bfloat16)
    assert head.decoder.weight.dtype == head.bias.dtype == torch.bfloat16
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_the_state_dict_has_float32_values_and_loads_them(assign, copied):
    plain = Net().eval()
    model = ipex.optimize(plain, dtype=torch.bfloat16, conv_bn_folding=False)
    model = copy.deepcopy(model) if copied else model
    outer = nn.Sequential(model)
    state = outer.state_dict()
    assert state.keys() == {f"0.{name}" for name in plain.state_dict()}
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    assert state["0.head.weight"].data_ptr() == state["0.embedding.weight"].data_ptr()
    assert torch.equal(state["0.lstm.weight_ih_l0"], plain.lstm.weight_ih_l0.detach().bfloat16().float())
    state["0.conv.weight"] = torch.full_like(state["0.conv.weight"], 1.5)
    outer.load_state_dict(state, assign=assign)
    assert model.conv.weight.dtype == model.embedding.weight.dtype == torch.bfloat16
    assert (model.conv.weight == 1.5).all()


def test_another_dtype_stays_with_one_warning(caplog):
    model = nn.Linear(3, 4).double().eval()
    with caplog.at_level(logging.WARNING, "ipex_quant"):
        optimized = ipex.optimize(model, dtype=torch.bfloat16)
    assert caplog.messages == [
        "[NotSupported]Can't convert model's parameters dtype from torch.float64 to torch.bfloat16"
    ]
    assert optimized.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformer_encoder_layers_of_torch(dtype):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(x)
        optimized = ipex.optimize(model, dtype=dtype)
        torch.testing.assert_close(optimized(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(optimized(x).float(), expected, rtol=0.05, atol=0.05)
