"""torch.jit: what `llm.optimize` makes can be traced, frozen, saved, loaded and called with other inputs."""

import io

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.quantization import (
    WoqLowpMode,
    WoqWeightDtype,
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

from .conftest import build, inputs_of


class Logits(nn.Module):
    """What a script traces: tensors in, one tensor out."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def weight_only(model, inputs, **options):
    mapping = get_weight_only_quant_qconfig_mapping(group_size=32, **options)
    return ipex.llm.optimize(model, quantization_config=mapping)


def int8(mapping, model, inputs):
    prepared = prepare(model, mapping, example_kwarg_inputs=inputs)
    prepared(**inputs)
    return ipex.llm.optimize(convert(prepared))


WAYS = {
    "woq": lambda *given: weight_only(*given, weight_dtype=WoqWeightDtype.INT8),
    "woq int8": lambda *given: weight_only(*given, weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.INT8),
    "static": lambda *given: int8(ipex.quantization.default_static_qconfig_mapping, *given),
    "smooth": lambda *given: int8(get_smooth_quant_qconfig_mapping(), *given),
    "dynamic": lambda *given: int8(ipex.quantization.default_dynamic_qconfig_mapping, *given),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:.*stay in float")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "t5"])
@torch.no_grad()
def test_a_traced_model_computes_what_the_model_does(name, way):
    model = build(name)
    inputs = inputs_of(model)
    module = Logits(WAYS[way](model, inputs), list(inputs)).eval()
    traced = torch.jit.freeze(torch.jit.trace(module, tuple(inputs.values()), check_trace=False))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    traced = torch.jit.load(file)
    for other in (inputs, {key: tensor[:1].flip(1) for key, tensor in inputs.items()}):
        expected = module(*other.values())
        # Folding constants can move an activation to the next 8-bit code.
        assert (traced(*other.values()) - expected).norm() / expected.norm() < 5e-3


def test_a_linear_group_can_be_traced():
    layers = [nn.Linear(32, size, bias=size == 16).requires_grad_(False) for size in (16, 8)]
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)
    layers = [convert(prepare(layer, mapping)) for layer in layers]

    def both(x):
        tensors = [layer._packed for layer in layers], [16, 8], [layer._bias for layer in layers]
        return torch.cat(ipex.ops.woq_linear_group(x, *tensors), dim=-1)

    x = torch.randn(3, 32)
    assert torch.equal(torch.jit.trace(both, torch.randn(2, 32))(x), both(x))
