"""GPTQ of experts in 3-D parameters."""

import copy

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.checkpoints import load_low_precision_checkpoint
from ipex_quant.nn import WeightOnlyQuantizedExperts
from ipex_quant.nn.stacked_experts import expert_weight
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping, gptq
from ipex_quant.woq.gptq import GptqOptions, HessianAccumulator, quantize_weight
from ipex_quant.woq.gptq_blocks import quantize_blocks
from ipex_quant.woq.rtn import rtn

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 32)
OPTIONS = GptqOptions(scale_dtype=torch.float16)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4, "intermediate_size": 32}
MODELS = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**SIZES)),
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig(**SIZES, head_dim=16)),
}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model_class, config = MODELS[request.param]
    model = model_class(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 96, (2, 40), generator=generator) for _ in range(3)]
    masks = [torch.ones_like(each) for each in tokens]
    masks[1][0, :30] = 0
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(tokens, masks, strict=True)]


def routed(model, batches):
    """Tokens, not masked, that the experts of the first layer are called with, and where they go."""
    calls = []
    experts = model.get_submodule(EXPERTS)
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].flatten().bool() for batch in batches]
    return [torch.cat([call[i][mask] for call, mask in zip(calls, masks, strict=True)]) for i in range(2)]


def test_experts_are_calibrated_with_their_tokens(model, batches):
    before = copy.deepcopy(model.state_dict())
    weights = quantize_blocks(model, batches, SCHEME, OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, module in model.named_modules():  # what comes before the first experts
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.0"):
            module.weight.data = dequantize(weights[name])
    tokens, chosen = routed(model, batches)
    module = model.get_submodule(EXPERTS)
    for expert in range(4):
        x = tokens[(chosen == expert).any(-1)]
        seen = HessianAccumulator(64)
        seen.add(x)
        expected = quantize_weight(expert_weight(module, "gate_up", expert), seen.hessian, SCHEME, OPTIONS)
        gate, up = (weights[f"{EXPERTS}.{expert}.{part}_proj"] for part in ("gate", "up"))
        assert torch.equal(torch.cat((gate.codes, up.codes)), expected.codes)
        assert torch.equal(torch.cat((gate.scales, up.scales)), expected.scales)
        both = x @ dequantize(expected).T
        if module.has_bias:
            bias = module.gate_up_proj_bias[expert]
            both = module._apply_gate(torch.stack(both.chunk(2, -1), -1).flatten(-2) + bias)
        else:
            both = module._apply_gate(both)
        seen = HessianAccumulator(32)
        seen.add(both)
        expected = quantize_weight(expert_weight(module, "down", expert), seen.hessian, SCHEME, OPTIONS)
        assert (weights[f"{EXPERTS}.{expert}.down_proj"].codes == expected.codes).float().mean() > 0.999


def test_an_expert_without_tokens_is_rounded_to_nearest(model, batches):
    mlp = model.model.layers[0].mlp
    router = mlp.gate if hasattr(mlp, "gate") else mlp.router
    router.register_forward_hook(lambda module, args, out: (*out[:2], out[2].where(out[2] != 2, 3)))
    with pytest.warns(UserWarning, match=rf"no calibration token is routed to {EXPERTS}\.2 \(1 experts\)"):
        weights = quantize_blocks(model, batches, SCHEME, OPTIONS)
    module = model.get_submodule(EXPERTS)
    expected = rtn(expert_weight(module, "down", 2), SCHEME, torch.float16)
    assert torch.equal(weights[f"{EXPERTS}.2.down_proj"].codes, expected.codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_written_checkpoint_is_read_again(model, batches, act_order, tmp_path):
    gptq(model, batches, group_size=32, act_order=act_order, save_dir=tmp_path / "gptq")
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    mapping.set_module_name("lm_head", None)
    other = copy.deepcopy(model)
    for parameter in other.model.layers.parameters():
        parameter.data.zero_()
    for layer, source in zip(other.model.layers, model.model.layers, strict=True):
        layer.mlp.experts.load_state_dict(source.mlp.experts.state_dict())
    checkpoint = load_low_precision_checkpoint(tmp_path / "gptq")
    assert not any(name.endswith(("gate_up_proj", "down_proj_bias")) for name in checkpoint[0])
    with torch.inference_mode():
        quantized = ipex.llm.optimize(other, quantization_config=mapping, low_precision_checkpoint=checkpoint)
        experts = [each for each in quantized.modules() if isinstance(each, WeightOnlyQuantizedExperts)]
        assert len(experts) == 2
        assert (experts[0].quantized_stack("gate_up").g_idx is not None) == act_order
        nearest = ipex.llm.optimize(model, quantization_config=mapping.set_global(_rounded()))
        tokens = torch.cat([batch["input_ids"] for batch in batches])
        expected = model(tokens).logits
        errors = [(each(tokens).logits - expected).square().mean() for each in (quantized, nearest)]
    assert errors[0] < errors[1]


def _rounded():
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32).global_qconfig


def test_nan_in_an_expert_names_the_module(model, batches, tmp_path):
    model.get_submodule(EXPERTS).down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=f"{EXPERTS}: expected finite values"):
        gptq(model, batches, save_dir=tmp_path / "gptq")
