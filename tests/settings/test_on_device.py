import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex

SMALL = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: LlamaForCausalLM(SMALL)])
def test_modules_are_made_there_and_so(device, make):
    with ipex.OnDevice(dtype=torch.float16, device=device):
        parameters = list(make().parameters())
    assert {p.device.type for p in parameters} == {device}
    assert {p.dtype for p in parameters} == {torch.float16}
    assert torch.empty(1).dtype == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_nesting_and_errors_leave_nothing_behind():
    meta = ipex.OnDevice(torch.bfloat16)
    with meta, ipex.OnDevice(torch.float64, "cpu"), meta:
        assert torch.zeros(1).dtype == torch.bfloat16
        assert torch.zeros(1).is_meta
        assert torch.zeros(1, dtype=torch.int8, device="cpu").dtype == torch.int8
    with pytest.raises(KeyError), meta:
        raise KeyError
    assert torch.zeros(1).dtype == torch.float32
    assert not torch.zeros(1).is_meta
    with ipex.OnDevice(torch.bfloat16, enabled=False):
        assert torch.zeros(1).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", None])
def test_dtypes_that_are_no_default(dtype):
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype"):
        ipex.OnDevice(dtype)


def test_a_device_that_nobody_knows():
    with pytest.raises(RuntimeError):
        ipex.OnDevice(torch.float32, "nonsense")
