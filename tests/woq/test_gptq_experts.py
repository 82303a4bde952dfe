"""GPTQ of experts in 3-D parameters."""

import copy

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.checkpoints import load_low_precision_checkpoint
from ipex_quant.nn import WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear
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
    with pytest.warns(UserWarning, match=rf"no calibration token is routed to 1 experts \({EXPERTS}\.2\)"):
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


OTHERS = {
    "nemotron_h": (
        transformers.NemotronHForCausalLM,
        {
            **{"layers_block_type": ["moe", "attention"], "head_dim": 16, "n_routed_experts": 4, "n_group": 1},
            **{"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 24, "topk_group": 1},
        },
        "model.layers.0.mixer.experts",
        ("up", "down"),
    ),
    "llama4": (
        transformers.Llama4ForCausalLM,
        {"intermediate_size_mlp": 48, "head_dim": 16, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
        "model.layers.0.feed_forward.experts",
        ("gate", "up", "down"),
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_experts_without_a_gate_and_batched_ones(family, batches, tmp_path):
    """The first experts that are run see their tokens, and the checkpoint has all their parts."""
    model_class, options, name, parts = OTHERS[family]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(SIZES | options))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    gptq(model, batches, group_size=32, scale_dtype=torch.float32, save_dir=tmp_path / "gptq")
    checkpoint = load_low_precision_checkpoint(tmp_path / "gptq")
    stored = {key.removesuffix(".qweight") for key in checkpoint[0] if key.endswith(".qweight")}
    assert {f"{name}.{expert}.{part}_proj" for expert in range(4) for part in parts} <= stored
    assert not any(f"{name}.{part}_proj" in key for key in checkpoint[0] for part in ("gate_up", *parts))
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    with torch.inference_mode():
        quantized = ipex.llm.optimize(model, quantization_config=mapping, low_precision_checkpoint=checkpoint)
        nearest = ipex.llm.optimize(model, quantization_config=mapping.set_global(_rounded()))
        module, rounded = (each.get_submodule(name) for each in (quantized, nearest))
        rows = _routed_rows(model, batches, quantized, name)
        errors = {}
        for kind, each in (("gptq", module), ("nearest", rounded)):
            stack = each.quantized_stack("gate_up")
            for expert, x in rows.items():
                change = dequantize(stack[expert]) - expert_weight(model.get_submodule(name), "gate_up", expert)
                errors[kind, expert] = float((x @ change.T).square().sum())
    assert len(rows) > 1
    for expert in rows:
        assert errors["gptq", expert] < errors["nearest", expert]


def _routed_rows(model, batches, quantized, name):
    """What every expert that gets tokens reads, when the linears before it are quantized."""
    calls = []
    probe = copy.deepcopy(model)
    for each, module in quantized.named_modules():
        if isinstance(module, WeightOnlyQuantizedLinear) and not each.startswith(name.removesuffix(".experts")):
            probe.get_submodule(each).weight.data = dequantize(module.quantized_weight())
    probe.get_submodule(name).register_forward_pre_hook(lambda module, args: calls.append(args))
    masks = []
    for batch in batches:
        probe(**batch)
        masks.append(batch["attention_mask"].flatten().bool())
    found = {}
    for expert in range(4):
        rows = []
        for mask, call in zip(masks, calls, strict=True):
            x = call[0]
            x = x.view(4, -1, 64)[expert][mask] if len(call) == 1 else x[mask & (call[1] == expert).any(-1)]
            rows.append(x[(x != 0).any(-1)])
        if len(torch.cat(rows)):
            found[expert] = torch.cat(rows)
    return found
