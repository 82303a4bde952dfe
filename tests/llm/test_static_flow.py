"""IPEX's three steps of static quantization, and dynamic quantization, through `llm.optimize` on any model."""

import copy
import logging

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.nn import Int8Linear
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.quantization import get_smooth_quant_qconfig_mapping

from .conftest import inputs_of


def int8_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def calibrated_summary(model, mapping, path, dtype=torch.float32):
    """Steps (a) and (b) of IPEX's flow."""
    lowered = ipex.llm.optimize(model.eval(), dtype=dtype, quantization_config=mapping)
    inputs = inputs_of(model)
    prepared = ipex.quantization.prepare(lowered, mapping, example_kwarg_inputs=inputs, inplace=True)
    for shift in range(3):
        prepared(**{name: (value + shift) % 96 if "ids" in name else value for name, value in inputs.items()})
    prepared.save_qconf_summary(qconf_summary=path)
    return prepared


class Simulated(nn.Module):
    """What an Int8Linear computes, in floats."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight.clone(), layer.bias

    def forward(self, x):
        activation = self.layer.activation
        if activation is None:
            low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
            scale, factor = (high - low) / 255, 1
            zero_point = (-low / scale).round()
        else:
            scale, zero_point, factor = activation.scale, activation.zero_point, activation.smoothing_factor
            factor = 1 if factor is None else factor
        codes = (x * factor / scale).round() + zero_point
        return nn.functional.linear((codes.clamp(0, 255) - zero_point) * scale / factor, self.weight, self.bias)


def simulated(model):
    model = copy.deepcopy(model)
    restore_forwards(model)  # fused layers call the modules that they were fused of
    for name, layer in int8_layers(model).items():
        model.set_submodule(name, Simulated(layer))
    return model


def agree(actual, expected):
    """Whether most tokens are alike: where float sums differ in a last bit, a code may fall to either side."""
    errors = (actual.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return (errors < 1e-3).float().mean() >= 0.5 and errors.max() < 0.5


def relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.filterwarnings("ignore:calibration never reached 4 layers.*dt_proj")  # Mamba only reads their weights
@pytest.mark.filterwarnings("ignore:2 layers stay in float.*experts")  # those of Qwen3-MoE
@pytest.mark.parametrize("smooth", [True, False])
def test_three_steps(any_model, logits, tmp_path, caplog, smooth):
    static = ipex.quantization.default_static_qconfig_mapping
    mapping = get_smooth_quant_qconfig_mapping() if smooth else static
    path = str(tmp_path / "qconfig.json")
    with caplog.at_level(logging.INFO, logger="ipex_quant"):
        prepared = calibrated_summary(copy.deepcopy(any_model), mapping, path)
    assert "prepared for the calibration of the static quantization" in caplog.text
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    model = ipex.llm.optimize(any_model, quantization_config=mapping, qconfig_summary_file=path)
    assert int8_layers(model)
    assert agree(logits(model), logits(simulated(model)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())

    converted = ipex.quantization.convert(prepared)
    assert int8_layers(converted).keys() == int8_layers(model).keys()
    assert agree(logits(converted), logits(model))


def test_a_bf16_model_in_place(llama, logits, tmp_path):
    mapping = get_smooth_quant_qconfig_mapping()
    calibrated_summary(copy.deepcopy(llama), mapping, tmp_path / "q.json")
    expected = logits(llama)
    model = ipex.llm.optimize(
        llama,
        dtype=torch.bfloat16,
        quantization_config=mapping,
        qconfig_summary_file=tmp_path / "q.json",
        inplace=True,
    )
    assert model is llama
    assert logits(model).dtype == torch.bfloat16
    assert relative_error(logits(model), expected) < 0.1
    tokens = model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 10)


def test_groups_are_found_with_and_without_an_example(make_model, tmp_path):
    mapping = get_smooth_quant_qconfig_mapping()
    llama = make_model("llama")
    calibrated_summary(copy.deepcopy(llama), mapping, tmp_path / "q.json")
    for samples in (None, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, (torch.ones(1, 3, dtype=torch.long),)):
        model = ipex.llm.optimize(
            llama, quantization_config=mapping, qconfig_summary_file=tmp_path / "q.json", sample_inputs=samples
        )
        layer = model.model.layers[0]
        assert len(layer.self_attn.q_proj.share_group.inputs) == 3
        assert layer.self_attn.q_proj.activation.smoothing_factor is None, "folded into the norm"
    type(llama).dummy_inputs, saved = property(lambda self: {"pixel_values": None}), type(llama).dummy_inputs
    try:
        model = ipex.llm.optimize(llama, quantization_config=mapping, qconfig_summary_file=tmp_path / "q.json")
    finally:
        type(llama).dummy_inputs = saved
    assert len(model.model.layers[0].self_attn.q_proj.share_group.inputs) == 3, "the file tells as well"


def test_dynamic(any_model, logits):
    model = ipex.llm.optimize(any_model, quantization_config=ipex.quantization.default_dynamic_qconfig_mapping)
    assert all(module.activation is None for module in int8_layers(model).values())
    assert int8_layers(model)
    assert relative_error(logits(model), logits(simulated(model))) < 0.02


def test_dynamic_groups_are_found(llama):
    model = ipex.llm.optimize(llama, quantization_config=ipex.quantization.default_dynamic_qconfig_mapping)
    assert len(model.model.layers[0].mlp.up_proj.share_group.inputs) == 2


def test_a_module_left_out_stays_float(llama, tmp_path):
    mapping = get_smooth_quant_qconfig_mapping().set_module_name("lm_head", None)
    calibrated_summary(copy.deepcopy(llama), mapping, tmp_path / "q.json")
    model = ipex.llm.optimize(llama, quantization_config=mapping, qconfig_summary_file=tmp_path / "q.json")
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match=r"lacks the layers \['lm_head'\]"):
        ipex.llm.optimize(
            llama, quantization_config=get_smooth_quant_qconfig_mapping(), qconfig_summary_file=tmp_path / "q.json"
        )


def test_bad_summary_files(llama, tmp_path):
    mapping = get_smooth_quant_qconfig_mapping()
    with pytest.raises(OSError, match="nowhere"):
        ipex.llm.optimize(llama, quantization_config=mapping, qconfig_summary_file="nowhere.json", inplace=True)
    assert type(llama.lm_head) is nn.Linear
    (tmp_path / "q.json").write_text("{}")
    with pytest.raises(ValueError, match="qconf summary: it belongs to another model"):
        ipex.llm.optimize(llama, quantization_config=mapping, qconfig_summary_file=tmp_path / "q.json")
