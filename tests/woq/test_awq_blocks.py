import copy
import logging

import pytest
import torch
import transformers

from ipex_quant.nn.linears import is_linear, weight_matrix
from ipex_quant.nn.norms import is_norm
from ipex_quant.numerics.affine import dequantize, quantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.awq import AwqOptions, InputSample, clipped
from ipex_quant.woq.awq_blocks import AwqResult, awq_blocks
from ipex_quant.woq.gptq import GptqOptions, HessianAccumulator, quantize_weight
from ipex_quant.woq.gptq_blocks import quantize_blocks
from ipex_quant.woq.rtn import rtn

SCHEME = WeightScheme(WoqWeightDtype.INT4, True, 16)
FEW = AwqOptions(alpha_steps=4, clip_steps=2)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, "bos_token_id": 0}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 32}
NORM, UP = "a norm", "mlp.up_proj"
LLAMA = {"q_proj": NORM, "o_proj": "self_attn.v_proj", "gate_proj": NORM, "down_proj": UP}
FUSED = {"qkv_proj": NORM, "o_proj": "self_attn.qkv_proj", "gate_up_proj": NORM, "down_proj": "mlp.gate_up_proj"}

ABSORBERS = {
    "Llama": ({"attention_bias": True, "mlp_bias": True}, LLAMA),
    "Qwen3": ({"head_dim": 8}, LLAMA),
    "Gemma": ({"head_dim": 8, "num_key_value_heads": 1}, LLAMA),
    "Gemma2": ({"head_dim": 8}, LLAMA),
    "Phi3": ({}, FUSED),
    "OPT": (OPT, {"q_proj": NORM, "out_proj": "self_attn.v_proj", "fc1": NORM, "fc2": "fc1"}),
    "GPT2": (GPT2, {"c_attn": NORM, "attn.c_proj": "attn.c_attn", "c_fc": NORM, "mlp.c_proj": None}),
    "GPTNeoX": ({}, {"query_key_value": NORM, "attention.dense": None, "dense_h_to_4h": NORM, "4h_to_h": None}),
    "Phi": ({}, {"q_proj": NORM, "dense": "self_attn.v_proj", "fc2": None}),
}
"""Additional sizes, and what takes the scale of the linear whose name ends so, None if nothing can."""


def build(name, sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(sizes if name == "GPT2" else SIZES | sizes))
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config).eval()
    for parameter in model.parameters():  # norms and biases of their own, and some channels larger than others
        parameter.data += 0.1 * torch.randn(parameter.shape) * (0.5 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 64, (2, 20), generator=generator)} for _ in range(3)]


def scale_in_float(model, result):
    """Do to the float weights what was done to them before they were quantized."""
    parameters = dict(model.named_parameters())
    for name, value in result.parameters.items():
        parameters[name].data.copy_(value)
    for scaling in result.scalings:
        if scaling.scale is not None:
            for member in scaling.members:
                weight_matrix(model.get_submodule(member)).mul_(scaling.scale)
            absorber = model.get_submodule(scaling.absorber)
            if is_linear(absorber):
                weight_matrix(absorber).mul_(scaling.factor.unsqueeze(1))


@pytest.mark.parametrize("name", ABSORBERS)
def test_the_scaled_float_model_computes_the_same(name, batches):
    sizes, absorbers = ABSORBERS[name]
    model = build(name, sizes)
    inputs = batches[0]["input_ids"]
    with torch.no_grad():
        expected = model(inputs).logits
        result = awq_blocks(model, batches, SCHEME, FEW)
        assert torch.equal(model(inputs).logits, expected)  # it came back as it was
        scale_in_float(model, result)
        torch.testing.assert_close(model(inputs).logits, expected, rtol=1e-4, atol=1e-4)

    for scaling in result.scalings:
        (absorber,) = (value for key, value in absorbers.items() if scaling.members[0].endswith(key))
        if scaling.scale is None:
            assert absorber is None or scaling.search.alpha == 0
        else:
            assert is_norm(model.get_submodule(scaling.absorber)) or scaling.absorber.endswith(absorber)
            assert scaling.search.error < scaling.search.plain_error
    scaled = {s.members[0].rpartition(".")[2] for s in result.scalings if s.scale is not None}
    assert len(scaled) >= sum(absorber is not None for absorber in absorbers.values()) - 1


def quantized(model, result):
    """Give `model` the weights that were found, as floats, and the other parameters."""
    for name, value in result.parameters.items():
        model.get_parameter(name).data = value
    for name, weight in result.weights.items():
        weight_matrix(model.get_submodule(name)).copy_(dequantize(weight))
    return model


def test_weights_are_the_scaled_and_clipped_ones_quantized(batches):
    """The first share group, whose inputs nothing before it has changed."""
    model = build("Llama", {})
    model.model.layers[0].input_layernorm.weight.data[:2] *= 20
    result = awq_blocks(model, batches, SCHEME, FEW)
    first = result.scalings[0]
    assert first.members == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    sample = InputSample(32, FEW.tokens)
    with torch.no_grad():
        for batch in batches:
            sample.add(model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"])))
        for name in first.members[:2]:
            scaled = model.get_submodule(name).weight * first.scale
            expected = quantize(clipped(scaled, SCHEME, sample.vectors / first.scale, FEW), SCHEME)
            assert torch.equal(result.weights[name].codes, expected.codes)
            assert torch.equal(result.weights[name].scales, expected.scales)
        # v has also taken the scale of o, in its rows' scales alone
        second = result.scalings[1]
        assert second.absorber == first.members[2]
        scaled = model.get_submodule(first.members[2]).weight * first.scale
        expected = quantize(clipped(scaled, SCHEME, sample.vectors / first.scale, FEW), SCHEME)
        found = result.weights[first.members[2]]
        assert torch.equal(found.codes, expected.codes)
        torch.testing.assert_close(found.scales, expected.scales * second.factor.unsqueeze(1))


def test_gptq_rounds_the_scaled_weights(batches):
    """The first share group: its inputs are those of the float model, so that there is nothing to correct."""
    model = build("Llama", {})
    model.model.layers[0].input_layernorm.weight.data[:2] *= 20
    options = AwqOptions(alpha_steps=4, gptq=GptqOptions(scale_dtype=torch.float16))
    result = awq_blocks(model, batches, SCHEME, options)
    first, second = result.scalings[:2]
    assert first.scale is not None
    assert second.absorber == first.members[2]
    seen = HessianAccumulator(32)
    with torch.no_grad():
        for batch in batches:
            seen.add(model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"])) / first.scale)
        for name, factor in zip(first.members, (1.0, 1.0, second.factor.unsqueeze(1)), strict=True):
            scaled = model.get_submodule(name).weight * first.scale
            expected = quantize_weight(scaled, seen.hessian, SCHEME, options.gptq)
            found = result.weights[name]
            assert (found.codes == expected.codes).float().mean() > 0.99
            torch.testing.assert_close(found.scales, expected.scales * factor, rtol=1e-3, atol=0)
            assert torch.equal(found.scales, found.scales.half().float())


def test_awq_with_gptq_has_less_error_than_awq(batches):
    model = build("Llama", {})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= 20
        inputs = torch.cat([batch["input_ids"] for batch in batches])
        exact = model(inputs).logits
        found = [
            awq_blocks(model, batches, SCHEME),
            awq_blocks(model, batches, SCHEME, AwqOptions(gptq=GptqOptions(correction=0.0))),
            awq_blocks(model, batches, SCHEME, AwqOptions(gptq=GptqOptions())),
        ]
        errors = [float((quantized(copy.deepcopy(model), each)(inputs).logits - exact).norm()) for each in found]
        assert errors[2] < errors[1] < 0.9 * errors[0]
        for result in found:
            assert any(scaling.scale is not None for scaling in result.scalings)


def test_without_scales_awq_with_gptq_is_gptq(batches):
    model = build("Llama", {})
    found = awq_blocks(model, batches, SCHEME, AwqOptions(alpha_steps=0, gptq=GptqOptions()))
    assert found.parameters == {}
    for name, expected in quantize_blocks(model, batches, SCHEME).items():
        assert torch.equal(found.weights[name].codes, expected.codes)
        assert torch.equal(found.weights[name].scales, expected.scales)


def test_a_scale_that_float16_cannot_hold_is_not_absorbed(batches):
    model = build("Llama", {"attention_bias": True})
    v = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():  # a channel of large values by its bias, with the smallest scales that float16 has
        v.bias[0] = 30.0
        v.weight[0] = v.weight[0].sign() * 3e-7
    result = awq_blocks(model, batches, SCHEME, AwqOptions(gptq=GptqOptions(scale_dtype=torch.float16)))
    second = result.scalings[1]
    assert second.members == ("model.layers.0.self_attn.o_proj",)
    assert second.scale is None
    assert second.search.alpha > 0
    scales = result.weights["model.layers.0.self_attn.v_proj"].scales
    assert torch.equal(scales, scales.half().float())


def test_scales_shared_by_repeated_heads_are_equal(batches):
    result = awq_blocks(build("Llama", {}), batches, SCHEME, FEW)
    scale = next(s.scale for s in result.scalings if s.members[0].endswith("o_proj") and s.scale is not None)
    heads = scale.view(2, 2, 8)  # of 2 key heads, each for 2 query heads
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0], heads[1])


@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_a_half_precision_norm_takes_a_rounded_scale_and_the_weight_that_same_one(name, batches):
    model = build(name, {"head_dim": 8}).bfloat16()
    result = awq_blocks(model, batches, SCHEME, FEW)
    offset = 1.0 if name == "Gemma" else 0.0
    scaled = [s for s in result.scalings if s.scale is not None and "norm" in s.absorber]
    assert scaled
    for scaling in scaled:
        old, new = model.get_parameter(f"{scaling.absorber}.weight"), result.parameters[f"{scaling.absorber}.weight"]
        assert new.dtype == torch.bfloat16
        torch.testing.assert_close((new.float() + offset) * scaling.scale, old.float() + offset, rtol=1e-6, atol=1e-6)


def test_less_error_in_the_logits_than_rounding_to_nearest(batches):
    model = build("Llama", {})
    with torch.no_grad():  # outliers, as large models have
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= 20
            layer.post_attention_layernorm.weight[3] *= 20
        inputs = batches[0]["input_ids"]
        exact = model(inputs).logits
        result = awq_blocks(model, batches, SCHEME)
        nearest = AwqResult({name: rtn(model.get_submodule(name).weight, SCHEME) for name in result.weights}, {}, [])
        errors = [
            float((quantized(copy.deepcopy(model), each)(inputs).logits - exact).norm()) for each in (result, nearest)
        ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("scheme", [SCHEME, WeightScheme(WoqWeightDtype.INT8, False), WeightScheme(WoqWeightDtype.NF4)])
def test_without_steps_the_result_is_round_to_nearest(scheme, batches):
    model = build("Llama", {})
    result = awq_blocks(model, batches, scheme, AwqOptions(alpha_steps=0, clip_steps=0))
    assert result.parameters == {}
    for name, found in result.weights.items():
        nearest = rtn(model.get_submodule(name).weight, scheme)
        assert torch.equal(found.codes, nearest.codes)
        assert torch.equal(found.scales, nearest.scales)


def test_schemes_by_name(batches):
    schemes = {"q_proj": SCHEME, "v_proj": WeightScheme(WoqWeightDtype.FP8), "down_proj": SCHEME}
    model = build("Llama", {})
    told = r"nothing in 2 blocks can absorb a scale.*: model\.layers\.0\.self_attn\..*, model\.layers\.1\.self_attn\."
    with pytest.warns(UserWarning, match=told):
        result = awq_blocks(model, batches, lambda name: schemes.get(name.rpartition(".")[2]), FEW)
    assert {name.rpartition(".")[2] for name in result.weights} == schemes.keys()
    # k reads the norm's output in float, and what is before down is not quantized
    assert all(scaling.absorber is None for scaling in result.scalings)


def test_what_cannot_be_scaled_is_told(batches, caplog):
    with caplog.at_level(logging.INFO, "ipex_quant"):
        awq_blocks(build("GPT2", GPT2), batches, SCHEME, FEW)
    assert "AWQ: transformer.h.1.mlp.c_proj: no module before it can absorb a scale; it is only clipped" in caplog.text
    assert "share groups are scaled" in caplog.text


def test_a_norm_that_blocks_share_is_left_alone(batches):
    model = build("Llama", {})
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    result = awq_blocks(model, batches, SCHEME, FEW)
    assert not any("input_layernorm" in name for name in result.parameters)
    assert any("post_attention_layernorm" in name for name in result.parameters)


def test_channels_without_activations(batches):
    model = build("OPT", OPT)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight[5:9] = 0
            layer.fc1.bias[5:9] = -1  # the ReLU gives 0
            layer.self_attn.v_proj.weight[:] = 0
            layer.self_attn.v_proj.bias[:] = 0
    told = r"AWQ: calibration leaves 82 input channels of 4 layers at zero \(.*\.out_proj: 32 of 32, .*\.fc2: 6 of 64,"
    with pytest.warns(UserWarning, match=told):
        result = awq_blocks(model, batches, SCHEME, FEW)
    for scaling in result.scalings:
        if scaling.members[0].endswith("fc2") and scaling.scale is not None:
            assert torch.equal(scaling.scale[5:9], torch.ones(4))
        if scaling.members[0].endswith("out_proj"):
            assert scaling.scale is None
    assert all(torch.isfinite(weight.scales).all() for weight in result.weights.values())


def test_inputs_that_are_not_finite_are_named(batches):
    model = build("Llama", {})
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: inputs: expected finite values, got NaN"):
        awq_blocks(model, batches, SCHEME, FEW)


def test_no_batches():
    with pytest.raises(ValueError, match="batches: AWQ needs at least one calibration batch"):
        awq_blocks(build("Llama", {}), [], SCHEME)
