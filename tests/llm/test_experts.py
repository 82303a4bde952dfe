"""Models with experts in 3-D parameters, quantized weight-only."""

import copy

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant import ops
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedExpertLinears, WeightOnlyQuantizedExperts
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

from .conftest import random_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
QWEN = {**SIZES, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 6}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MODELS = {
    "mixtral": (transformers.MixtralForCausalLM, {**SIZES, "intermediate_size": 96, "num_local_experts": 4}),
    "qwen3_moe": (transformers.Qwen3MoeForCausalLM, {**QWEN, "head_dim": 16}),
    "qwen2_moe": (transformers.Qwen2MoeForCausalLM, {**QWEN, "shared_expert_intermediate_size": 48}),
    "olmoe": (transformers.OlmoeForCausalLM, {**SIZES, "intermediate_size": 48, "num_experts": 6}),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        {**SIZES, "intermediate_size": 48, "num_local_experts": 4, "head_dim": 16},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3ForCausalLM,
        {
            **SIZES,
            **LATENT,
            **{"num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8},
            **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        },
    ),
}
MODELS |= {
    # experts without a gate, and experts that are called with rows for each of them
    "nemotron_h": (
        transformers.NemotronHForCausalLM,
        {
            **SIZES,
            **{"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4, "head_dim": 16},
            **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
            **{"n_routed_experts": 8, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 24},
            **{"n_group": 1, "topk_group": 1},
        },
    ),
    # one linear of every expert at a time, in attention too
    "jetmoe": (
        transformers.JetMoeForCausalLM,
        {
            **{key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_experts_per_tok")},
            **{"num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 48, "num_local_experts": 4},
            **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False},
        },
    ),
    "llama4": (
        transformers.Llama4ForCausalLM,
        {
            **SIZES,
            **{"intermediate_size": 48, "intermediate_size_mlp": 96, "head_dim": 16, "num_local_experts": 4},
            **{"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 64},
        },
    ),
}
LAYER = "model.layers.1.mlp.experts"


def build(name):
    return random_model(*MODELS[name])


def mapping(dtype=WoqWeightDtype.INT4, **options):
    return get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, **{"group_size": 32, **options})


def optimized(model, **options):
    return ipex.llm.optimize(model, quantization_config=mapping(**options))


def experts_of(model):
    kinds = (WeightOnlyQuantizedExperts, WeightOnlyQuantizedExpertLinears)
    return {name: each for name, each in model.named_modules() if isinstance(each, kinds)}


def dequantized(model, quantized):
    """The float model with the quantized one's weights, in the layout of its own class."""
    reference = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        layer = reference.get_submodule(name)
        if isinstance(module, WeightOnlyQuantizedExperts):
            parts = module.dequantized_weight(torch.float32).split(module.intermediate_dim, dim=1)
            # Llama 4's does not say that it is transposed
            transposed = getattr(layer, "is_transposed", True)
            interleaved = not getattr(layer, "is_concatenated", True)
            gate_up = torch.stack(parts[:-1], 2).flatten(1, 2) if interleaved else torch.cat(parts[:-1], dim=1)
            name = "gate_up_proj" if len(parts) == 3 else "up_proj"
            getattr(layer, name).data = gate_up.transpose(1, 2) if transposed else gate_up
            layer.down_proj.data = parts[-1] if transposed else parts[-1].transpose(1, 2)
        elif isinstance(module, WeightOnlyQuantizedExpertLinears):
            layer.weight.data = module.dequantized_weight(torch.float32)
        elif isinstance(module, ipex.nn.WeightOnlyQuantizedLinear):
            layer.weight.data = affine.dequantize(module.quantized_weight())
    return reference


def tokens(*shape):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_prefill_and_decode_compute_what_the_weights_say(self, name):
        model = build(name)
        quantized = optimized(model)
        assert len(experts_of(quantized)) == {"deepseek_v3": 1, "jetmoe": 8}.get(name, 2)
        reference, ids = dequantized(model, quantized), tokens(2, 20)
        caches = [None, None]
        for step in (ids[:, :17], ids[:, 17:18], ids[:, 18:]):
            outputs = [
                each(step, **{CACHE: cache}, use_cache=True)
                for each, cache in zip((quantized, reference), caches, strict=True)
            ]
            caches = [output[CACHE] for output in outputs]
            torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(quantized(ids).logits, model(ids).logits, atol=1e-2)

    def test_a_left_padded_batch(self, name):
        model = build(name)
        quantized = optimized(model)
        reference, ids = dequantized(model, quantized), tokens(2, 9)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        ids[0, :4] = 0
        results = [each(ids, attention_mask=mask).logits[mask.bool()] for each in (quantized, reference)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(quantized.generate(ids, **options), reference.generate(ids, **options))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_loaded_as_it_was_saved(self, name, dtype, tmp_path):
        quantized = ipex.llm.optimize(build(name), dtype=dtype, quantization_config=mapping(lowp_mode=WoqLowpMode.INT8))
        ipex.llm.save(quantized, tmp_path / "a")
        quantized.save_pretrained(tmp_path / "b")
        for loaded in (
            ipex.llm.load(tmp_path / "a"),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b"),
        ):
            assert experts_of(loaded).keys() == experts_of(quantized).keys()
            for key, tensor in quantized.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], tensor)
            loaded = ipex.llm.optimize(loaded, dtype=dtype, inplace=True)
            assert torch.equal(loaded(tokens(1, 5)).logits, quantized(tokens(1, 5)).logits)


def test_only_chosen_experts_are_read():
    quantized, ids = optimized(build("mixtral")), tokens(1, 4)
    expected, used = quantized(ids).logits, []
    for module in experts_of(quantized).values():
        module.register_forward_pre_hook(lambda module, args: used.append(args[1].unique()))
    quantized(ids)
    quantized(ids[:, :1])
    chosen = [set(used[layer].tolist()) for layer in range(2)]
    for module, own in zip(experts_of(quantized).values(), chosen, strict=True):
        for packed in (module._gate_up_packed, module._down_packed):
            for expert in set(range(4)) - own:
                packed[64:].view(4, -1)[expert] = 255  # NaN scales
    assert torch.equal(quantized(ids).logits, expected)


class TestRules:
    def test_experts_follow_the_rules_of_linears(self):
        model = build("qwen3_moe")
        experts = type(model.model.layers[0].mlp.experts)
        by_name = mapping().set_module_name("model.layers.0.mlp", None)
        assert list(experts_of(ipex.llm.optimize(model, quantization_config=by_name))) == [LAYER]
        by_type = mapping().set_global(None).set_object_type(experts, mapping(WoqWeightDtype.NF4).global_qconfig)
        quantized = ipex.llm.optimize(model, quantization_config=by_type)
        assert [str(each.scheme) for each in experts_of(quantized).values()] == ["nf4 sym g32"] * 2
        assert not any(isinstance(each, ipex.nn.WeightOnlyQuantizedLinear) for each in quantized.modules())
        linears = mapping().set_global(None).set_object_type(torch.nn.Linear, mapping().global_qconfig)
        assert not experts_of(ipex.llm.optimize(model, quantization_config=linears))

    def test_activations_of_experts_are_not_quantized_ahead(self):
        static = ipex.quantization.default_static_qconfig_mapping
        model = build("mixtral")
        prepared = ipex.quantization.prepare(model, static, example_kwarg_inputs={"input_ids": tokens(1, 8)})
        prepared(tokens(2, 8))
        with pytest.warns(UserWarning, match="most weights stay in float: the experts in 3-D parameters of 2 modules"):
            quantized = ipex.quantization.convert(prepared)
        rows = {row.module: row for row in ipex.explain(quantized).rows}
        assert rows[LAYER].reason == "experts are quantized weight-only or dynamically, not static"
        assert rows[LAYER].scheme == "float32"

    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "llama4"])
    def test_dynamic_quantization_is_that_of_linears(self, name):
        """Of every expert, its weights a scale a channel and its activations as they come, a scale a token."""
        model, dynamic = build(name), ipex.quantization.default_dynamic_qconfig_mapping
        quantized = ipex.llm.optimize(model, quantization_config=dynamic)
        found = experts_of(quantized)
        assert len(found) == 2
        for place, module in found.items():
            original, calls = model.get_submodule(place), []
            original.register_forward_hook(lambda module, args, out, calls=calls: calls.append((args, out)))
            model(tokens(2, 20))
            ((args, expected),) = calls
            assert (module(*args) - expected).norm() < 0.03 * expected.norm()
            assert str(module.scheme) == "int8 sym per-channel"
            assert (module.lowp_mode, module.act_quant_mode) == (WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH)
        stack = module.quantized_stack("down")
        linear = Int8Linear.make_group([stack[1]], [None], None, torch.float32)[0]
        hidden = torch.randn(3, stack.shape[2], generator=torch.Generator().manual_seed(0))
        own = ops.pack_weight(stack[1])
        result = ops.woq_linear(hidden, own.data, own.shape[0], None, None, WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH)
        torch.testing.assert_close(result, linear(hidden), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"act_fn": torch.tanh}, "the activation of its experts has no kernel"),
            ({"has_gate": False}, "the parameters of its experts are none that are known"),
            ({"has_post_expert_norm": True}, "its experts have a norm"),
            ({"has_bias": True}, "the parameters of its experts are none that are known"),
            ({"is_transposed": True}, "the parameters of its experts are none that are known"),
        ],
    )
    def test_unknown_experts_stay_in_float(self, change, reason):
        model = build("qwen3_moe")
        for layer in model.model.layers:
            vars(layer.mlp.experts).update(change)
        with pytest.warns(UserWarning, match="experts in 3-D parameters of 2 modules"):
            quantized = optimized(model)
        rows = {row.module: row for row in ipex.explain(quantized).rows}
        assert rows[LAYER].reason == reason

    def test_nan_in_an_expert_names_the_module(self):
        model = build("mixtral")
        model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=rf"{LAYER}: .*finite"):
            optimized(model)

    def test_explain_counts_the_bytes(self):
        quantized = optimized(build("olmoe"), dtype=WoqWeightDtype.INT8, group_size=-1, lowp_mode=WoqLowpMode.BF16)
        row = next(row for row in ipex.explain(quantized).rows if row.module == LAYER)
        assert (row.scheme, row.shape, row.compute) == ("int8 asym per-channel", (6, 144, 64), "bf16")
        assert row.nbytes == experts_of(quantized)[LAYER].nbytes > 6 * 144 * 64


def test_awq_rounds_experts_to_nearest():
    with torch.inference_mode(False), torch.no_grad():
        model = build("mixtral")
        quantized = ipex.quantization.awq(model, [tokens(2, 20)], mapping())
    expected = experts_of(optimized(model))
    for name, module in experts_of(quantized).items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, expected[name].state_dict()[key])
    assert len(expected) == len(experts_of(quantized)) == 2


def test_compiles_without_a_graph_break():
    model = optimized(build("mixtral"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (5, 1):
        ids = tokens(2, length)
        results = [each(ids, use_cache=False).logits for each in (compiled, model)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_is_before_the_experts():
    with torch.inference_mode(False), torch.enable_grad():
        model = build("mixtral")
        quantized = optimized(model)
        reference, ids = dequantized(model, quantized), tokens(1, 6)
        for each in (quantized, reference):
            each.requires_grad_(False)
            each.model.embed_tokens.requires_grad_()
            each.model.layers[0].mlp.gate.requires_grad_()
            each(ids, use_cache=False).logits.square().sum().backward()
        pairs = [
            (quantized.model.embed_tokens.weight.grad, reference.model.embed_tokens.weight.grad),
            (quantized.model.layers[0].mlp.gate.weight.grad, reference.model.layers[0].mlp.gate.weight.grad),
        ]
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)
