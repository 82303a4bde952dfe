import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant import quantization
from ipex_quant.conversion.description import (
    KINDS,
    METHOD,
    describe,
    is_pretrained,
    main_dtype,
    share_groups,
)
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.quantization import (
    convert,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(12, 8)

    def forward(self, x):
        return self.o(torch.cat([self.q(x), self.k(x)], -1))


@pytest.fixture
def mixed():
    """q and k in INT8, o in 8 bits by its weight alone."""
    weight_only = get_weight_only_quant_qconfig_mapping().global_qconfig
    mapping = quantization.default_dynamic_qconfig_mapping.set_module_name("o", weight_only)
    return convert(prepare(Net().eval(), mapping, torch.randn(2, 8)))


def test_every_quantized_module_is_described_by_its_kind(mixed):
    entry = describe(mixed)
    assert entry["quant_method"] == METHOD
    assert entry["modules"].keys() == {"q", "k", "o"}
    assert KINDS[entry["modules"]["q"]["kind"]] is Int8Linear
    assert KINDS[entry["modules"]["o"]["kind"]] is WeightOnlyQuantizedLinear
    assert entry["modules"]["o"].items() >= {"weight_dtype": "int8", "group_size": -1, "bias": True}.items()


def test_modules_of_one_packed_weight_are_listed_in_its_order(mixed):
    assert share_groups(mixed) == describe(mixed)["share_groups"] == [["q", "k"]]
    assert share_groups(Net()) == []


def test_kinds_have_one_name_each():
    assert all(module.kind == name for name, module in KINDS.items())


def test_the_dtype_of_most_parameters():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(2, 2))
    assert main_dtype(model) == torch.bfloat16
    assert describe(model)["dtype"] == "bfloat16"
    assert main_dtype(nn.ReLU()) == torch.float32


def test_what_a_pretrained_model_is():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    assert is_pretrained(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8)))
    assert not is_pretrained(Net())
