import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ipex_quant.nn.prepacked import prepack, restore_prepacked
from ipex_quant.nn.prepacked_lstm import PrepackedLSTM

OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}, {"proj_size": 3}]


def close(actual, expected):
    torch.testing.assert_close(actual.float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_results_are_those_in_float32(options, dtype):
    torch.manual_seed(0)
    stock, x = nn.LSTM(6, 8, **options).eval(), torch.randn(4, 3, 6)
    lstm = copy.deepcopy(stock).to(dtype)
    prepack(PrepackedLSTM(lstm))
    expected, (h, c) = stock(x)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            output, state = lstm(x.to(dtype))
            assert output.dtype == state[0].dtype == dtype
            close(output, expected)
            close(state[1], c)
            close(lstm(x.to(dtype), (h.to(dtype), c.to(dtype)))[0], stock(x, (h, c))[0])
            with torch.autocast("cpu", torch.bfloat16):
                assert lstm(x)[0].dtype == torch.bfloat16
                close(lstm(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_sequences_and_copies(dtype):
    torch.manual_seed(0)
    stock, x = nn.LSTM(6, 8).eval(), torch.randn(4, 3, 6)
    lstm = copy.deepcopy(stock).to(dtype)
    prepack(PrepackedLSTM(lstm))
    with torch.no_grad():
        lstm(x.to(dtype))
        for model in (stock, lstm):
            model.weight_hh_l0.mul_(2)
            model.bias_ih_l0 = nn.Parameter(torch.full_like(model.bias_ih_l0, 0.5))
        expected = stock(x)[0]
        close(lstm(x.to(dtype))[0], expected)
        close(copy.deepcopy(lstm)(x.to(dtype))[0], expected)
        close(lstm(x[:, 0].to(dtype))[0], expected[:, 0])
        packed = lstm(pack_padded_sequence(x.to(dtype), [4, 2, 1]))[0]
        close(pad_packed_sequence(packed)[0][:, 0], expected[:, 0])
        close(pad_packed_sequence(packed)[0][0, 2], expected[0, 2])
    lstm(x.to(dtype))[0].sum().backward()
    stock(x)[0].sum().backward()
    close(lstm.weight_ih_l0.grad, stock.weight_ih_l0.grad)
    restore_prepacked(lstm)
    assert "forward" not in vars(lstm)


def test_errors_are_those_of_torch():
    lstm = nn.LSTM(6, 8).bfloat16()
    prepack(PrepackedLSTM(lstm))
    with pytest.raises((RuntimeError, ValueError)):
        lstm(torch.randn(4, 3, 6).double())
    with pytest.raises(RuntimeError):
        lstm(torch.randn(4, 3, 5).bfloat16())
