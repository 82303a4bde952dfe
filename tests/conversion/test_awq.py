import copy
from dataclasses import replace

import pytest
import torch
from outliers import inject_outliers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import ipex_quant as ipex
from ipex_quant import data, evaluation
from ipex_quant.conversion.calibration_batches import Samples, calibration_batches
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.nn.linears import is_linear, weight_matrix
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.quantization import (
    AwqOptions,
    WoqLowpMode,
    WoqWeightDtype,
    awq,
    default_static_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)
from ipex_quant.recipes.apply import apply_recipe, calibration_data
from ipex_quant.recipes.recipe import load_recipe
from ipex_quant.woq.awq_blocks import awq_blocks

INT4 = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=16)
FEW = AwqOptions(alpha_steps=4, clip_steps=2)
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, initializer_range=0.2, attention_bias=True)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_the_result_holds_what_the_search_found(model, samples):
    batches = calibration_batches(model, samples, Samples())
    expected = awq_blocks(model, batches, WeightScheme(WoqWeightDtype.INT4, False, 16), FEW)
    state = copy.deepcopy(model.state_dict())
    quantized = awq(model, samples, INT4, FEW)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(is_linear(module) for module in quantized.modules())
    for name, weight in expected.weights.items():
        module = quantized.get_submodule(name)
        assert isinstance(module, WeightOnlyQuantizedLinear)
        assert torch.equal(module.quantized_weight().codes, weight.codes)
        assert torch.equal(module.quantized_weight().scales, weight.scales)
    assert any("v_proj.bias" in name for name in expected.parameters)
    for name, value in expected.parameters.items():
        owner, _, key = name.rpartition(".")
        owner = quantized.get_submodule(owner)
        assert torch.equal(owner._bias if key == "bias" else getattr(owner, key), value)

    reference = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, WeightOnlyQuantizedLinear):
            weight_matrix(reference.get_submodule(name)).copy_(dequantize(module.quantized_weight()))
    for name, value in expected.parameters.items():
        reference.get_parameter(name).data = value
    torch.testing.assert_close(quantized(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


ERRORS = {2: 0.9, 3: 0.5, 4: 0.3, 5: 0.2, 6: 0.1, 8: 0.1}
"""Bounds of the relative error of the logits by bits of a weight."""


@pytest.mark.parametrize("dtype", list(WoqWeightDtype))
@pytest.mark.parametrize("lowp_mode", [WoqLowpMode.NONE, WoqLowpMode.INT8])
def test_every_dtype_saves_and_loads_bit_equal(model, samples, tmp_path, dtype, lowp_mode):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, group_size=32, lowp_mode=lowp_mode)
    with torch.inference_mode():
        exact = model(IDS).logits
        for parameter in model.parameters():  # the frequencies of the rotary embedding stay float32
            parameter.data = parameter.data.bfloat16()
        quantized = awq(model, samples, mapping, FEW, inplace=True)
        assert quantized is model
        quantized = ipex.llm.optimize(quantized, dtype=torch.bfloat16, inplace=True)
        logits = quantized(IDS).logits
        assert (logits.float() - exact).norm() < ERRORS[dtype.bits] * exact.norm()
        ipex.llm.save(quantized, tmp_path / "model")
        loaded = ipex.llm.load(tmp_path / "model")
        assert torch.equal(loaded(IDS).logits, logits)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, WeightOnlyQuantizedLinear)


def test_a_rule_keeps_a_layer_in_float(model, samples):
    mapping = copy.deepcopy(INT4).set_module_name_regex(r".*layers\.1\.mlp", None).set_module_name("lm_head", None)
    quantized = awq(model, samples, mapping, FEW)
    floats = {name for name, module in quantized.named_modules() if is_linear(module)}
    assert floats == {"lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))}
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight)
    assert quantized.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_a_tied_output_layer(samples):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, vocab_size=64, max_position_embeddings=32)).eval()
    exact = model(IDS).logits
    quantized = ipex.llm.optimize(awq(model, samples, INT4, FEW), dtype=torch.float32)
    assert isinstance(quantized.lm_head, WeightOnlyQuantizedLinear)
    assert (quantized(IDS).logits - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"quantization_config": INT4.global_qconfig},
            TypeError,
            "quantization_config: expected a QConfigMapping, got",
        ),
        (
            {"quantization_config": default_static_qconfig_mapping},
            ValueError,
            "quantization_config: AWQ quantizes weights only, .* model.layers.0.self_attn.q_proj has a QConfig",
        ),
        ({"dataloader": []}, ValueError, "dataloader: expected at least one sample, got none"),
        ({"nsamples": 0}, ValueError, "nsamples and pad_max_length: expected at least 1"),
        ({"model": torch.nn.Linear(16, 16)}, ValueError, r"model: Linear has no nn\.ModuleList of transformer blocks"),
    ],
)
def test_bad_arguments(model, samples, arguments, error, message):
    with pytest.raises(error, match=message):
        awq(**{"model": model, "dataloader": samples, "quantization_config": INT4} | arguments)


def test_a_weight_that_is_not_finite_is_named(model, samples):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: weight: expected finite values"):
        awq(model, samples, INT4)


def _embedded(dtype=torch.float32):
    folder = data.embedded_model_dir()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


@pytest.mark.parametrize(("outliers", "limit"), [(False, 0.97), (True, 0.4)])
def test_the_embedded_model_diverges_less_than_when_rounded_to_nearest(tokenizer, outliers, limit):
    """The more so with the outliers of large models."""
    recipe = load_recipe("w4a8-awq-g128")
    few = replace(recipe.settings, samples=8, sequence_length=128, alpha_steps=10, clip_steps=5, tokens=512)
    recipe = replace(recipe, settings=few)
    reference = _embedded()
    found, sizes = [], []
    for each in (recipe, load_recipe("w4a8-g128")):
        model = _embedded()
        if outliers:
            inject_outliers(model, lambda model=model: model(**model.dummy_inputs))
        model = apply_recipe(each, model, calibration_data(each, tokenizer))
        result = evaluation.compare(reference, model, tokenizer, data.held_out_text(), 256, 2048)
        found.append(result.kl_divergence)
        sizes.append(evaluation.model_bytes(model))
    assert sizes[0] == sizes[1]
    assert found[0] < limit * found[1]
