"""GPTQ checkpoints of models with experts, which hold every part of an expert as a linear layer of its own."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import ipex_quant as ipex
from ipex_quant.checkpoints import gptq_tensors
from ipex_quant.nn import WeightOnlyQuantizedExperts
from ipex_quant.nn.linears import holds_experts
from ipex_quant.nn.stacked_experts import expert_weight
from ipex_quant.numerics import affine
from ipex_quant.numerics.nibbles import pack_nibbles
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

from ..conftest import random_model

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 32)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODELS = {
    "mixtral": (transformers.MixtralForCausalLM, {"intermediate_size": 96, "num_local_experts": 4}),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 12, "head_dim": 16},
    ),
}
NAMES = {
    "mixtral": ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


def build(family, seed=0):
    model_class, options = MODELS[family]
    return random_model(model_class, SIZES | options, seed)


def with_order(qw, seed):
    """The same weight with its input features in another order (act-order)."""
    order = torch.randperm(qw.shape[1], generator=torch.Generator().manual_seed(seed))
    codes, g_idx = affine.stored_codes(qw)[:, order], affine.feature_groups(qw)[order].int()
    return QuantizedWeight(pack_nibbles(codes), qw.scales, qw.zero_points, g_idx, qw.scheme, qw.shape)


def parts_of(model):
    """Float weights of all experts by ``(layer, expert, part)``."""
    found = {}
    for layer, block in enumerate(model.model.layers):
        module = block.mlp.experts
        for expert in range(module.num_experts):
            gate, up = expert_weight(module, "gate_up", expert).chunk(2)
            parts = {"gate": gate, "up": up, "down": expert_weight(module, "down", expert)}
            found |= {(layer, expert, part): weight for part, weight in parts.items()}
    return found


def original_name(family, layer, expert, part):
    folder, names = NAMES[family]
    return f"model.layers.{layer}.{folder}.{expert}.{names[part]}"


def checkpoint_of(family, model, act_order=False, experts=True):
    """The state dict of `model` as GPTQ tools write it, under the names of the family's original checkpoints."""
    state = {name: t for name, t in model.state_dict().items() if not name.endswith(("gate_up_proj", "down_proj"))}
    state = {name.replace(".mlp.gate.", f".{NAMES[family][0].split('.')[0]}.gate."): t for name, t in state.items()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            qw = affine.quantize(state.pop(f"{name}.weight"), SCHEME)
            state |= {f"{name}.{key}": value for key, value in gptq_tensors(qw, v2=True).items()}
    for (layer, expert, part), weight in parts_of(model).items():
        name = original_name(family, layer, expert, part)
        if not experts:
            state[f"{name}.weight"] = weight.clone()
            continue
        qw = affine.quantize(weight, SCHEME)
        qw = with_order(qw, 10 * expert + (part == "down")) if act_order else qw
        state |= {f"{name}.{key}": value for key, value in gptq_tensors(qw, v2=True).items()}
    return state


def applied(model, state, **options):
    config = CONFIG | {"checkpoint_format": "gptq_v2"} | options.pop("config", {})
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    return ipex.llm.optimize(
        model, low_precision_checkpoint=(state, config), **{"quantization_config": mapping, **options}
    )


def experts_of(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, WeightOnlyQuantizedExperts)}


@pytest.mark.parametrize("act_order", [False, True])
def test_experts_get_the_weights_of_the_checkpoint(family, act_order):
    source, model = build(family, 1), build(family)
    state = checkpoint_of(family, source, act_order)
    quantized = applied(model, state, config={"desc_act": act_order})
    assert len(experts_of(quantized)) == 2
    parts = parts_of(source)
    for layer, module in enumerate(experts_of(quantized).values()):
        gate_up, down = (module.quantized_stack(name) for name in ("gate_up", "down"))
        assert (gate_up.g_idx is not None) == act_order
        for expert in range(module.num_experts):
            seed = 10 * expert
            for part, qw in (("gate", gate_up[expert]), ("up", gate_up[expert]), ("down", down[expert])):
                expected = affine.quantize(parts[layer, expert, part], SCHEME)
                if act_order:
                    expected = with_order(expected, seed + (part == "down"))
                rows = {"gate": slice(0, len(qw.codes) // 2), "up": slice(len(qw.codes) // 2, None)}
                rows = rows.get(part, slice(None))
                assert torch.equal(qw.codes[rows], expected.codes)
                torch.testing.assert_close(qw.scales[rows], expected.scales, rtol=1e-3, atol=0)
    for layer in range(2):
        gates = [each.model.layers[layer].mlp.gate.weight for each in (quantized, source)]
        assert torch.equal(*gates)
    tokens = torch.randint(3, 96, (2, 9))
    torch.testing.assert_close(quantized(tokens).logits, _dequantized(source, quantized)(tokens).logits, **_CLOSE)


_CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def _dequantized(model, quantized):
    for name, module in quantized.named_modules():
        layer = model.get_submodule(name)
        if isinstance(module, WeightOnlyQuantizedExperts):
            gate, up, down = module.dequantized_weight(torch.float32).chunk(3, dim=1)
            layer.gate_up_proj.data, layer.down_proj.data = torch.cat((gate, up), dim=1), down.transpose(1, 2)
        elif isinstance(module, ipex.nn.WeightOnlyQuantizedLinear):
            layer.weight.data = affine.dequantize(module.quantized_weight())
    return model


def test_a_model_without_values_takes_all_from_the_checkpoint(family, tmp_path):
    source = build(family, 1)
    state = {name: tensor.contiguous() for name, tensor in checkpoint_of(family, source).items()}
    save_file(state, tmp_path / "model.safetensors")
    config = {**CONFIG, "checkpoint_format": "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with torch.device("meta"):
        empty = build(family)
    for buffer in ("inv_freq", "original_inv_freq"):  # not saved, and so in no checkpoint
        setattr(empty.model.rotary_emb, buffer, getattr(source.model.rotary_emb, buffer).clone())
    stored = ipex.checkpoints.load_low_precision_checkpoint(tmp_path)
    quantized = ipex.llm.optimize(empty, low_precision_checkpoint=stored, inplace=True)
    assert len(experts_of(quantized)) == 2
    tokens = torch.randint(3, 96, (1, 9))
    expected = applied(source, state)
    assert torch.equal(quantized(tokens).logits, expected(tokens).logits)


def test_experts_in_float_are_stacked(family):
    source = build(family, 1)
    quantized = applied(build(family), checkpoint_of(family, source, experts=False))
    assert not experts_of(quantized)
    assert sum(map(holds_experts, quantized.modules())) == 2
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            pair = [getattr(each.model.layers[layer].mlp.experts, name) for each in (quantized, source)]
            assert torch.equal(*pair)
    rows = {row.module: row for row in ipex.explain(quantized).rows}
    assert rows[EXPERTS].reason == "it is not quantized in the checkpoint"


def test_the_compute_mode_is_the_mappings(family):
    mapping = get_weight_only_quant_qconfig_mapping(lowp_mode=WoqLowpMode.INT8).set_module_name("model.layers.0", None)
    quantized = applied(build(family), checkpoint_of(family, build(family, 1)), quantization_config=mapping)
    assert {name: each.lowp_mode for name, each in experts_of(quantized).items()} == {EXPERTS: WoqLowpMode.INT8}


@pytest.mark.parametrize("float_parts", [("gate", "up", "down"), ("down",)])
def test_an_expert_in_float_is_rounded_to_nearest(family, float_parts):
    source = build(family, 1)
    state, weights = checkpoint_of(family, source), parts_of(source)
    for part in float_parts:
        name = original_name(family, 0, 2, part)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.weight"] = weights[0, 2, part].clone()
    bias = torch.randn(64)
    state[f"{original_name(family, 0, 2, 'down')}.bias"] = bias
    with pytest.warns(UserWarning, match=rf"holds {len(float_parts)} parts of the experts .*layers\.0\.mlp\.experts"):
        module = experts_of(applied(build(family), state))["model.layers.0.mlp.experts"]
    for part, rows in (("gate", 0), ("up", 1), ("down", 2)):
        expected = affine.quantize(weights[0, 2, part], SCHEME)
        qw = module.quantized_stack("down" if part == "down" else "gate_up")[2]
        codes = qw.codes if part == "down" else qw.codes.chunk(2)[rows]
        assert torch.equal(codes, expected.codes), part
    assert torch.equal(module._down_bias[2], bias)


def test_a_float_expert_beside_those_with_an_order_of_their_own():
    source = build("mixtral", 1)
    state, weights = checkpoint_of("mixtral", source, act_order=True), parts_of(source)
    for part in ("gate", "up", "down"):
        name = original_name("mixtral", 0, 2, part)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.weight"] = weights[0, 2, part].clone()
    with pytest.warns(UserWarning, match="rounded to nearest as int4 asym g32"):
        module = experts_of(applied(build("mixtral"), state, config={"desc_act": True}))["model.layers.0.mlp.experts"]
    down = module.quantized_stack("down")
    assert torch.equal(affine.dequantize(down[2]), affine.dequantize(affine.quantize(weights[0, 2, "down"], SCHEME)))
    assert not torch.equal(down.g_idx[2], down.g_idx[1])


class TestBadCheckpoints:
    def test_a_float_part_of_another_shape_is_named(self):
        def cut(state):
            name = original_name("mixtral", 1, 3, "down")
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            state[f"{name}.weight"] = torch.ones(64, 95)

        with pytest.raises(ValueError, match=r"experts\.3\.down_proj\.weight: expected floats \[64, 96\]"):
            self.damaged(cut)

    def damaged(self, change, **options):
        state = checkpoint_of("mixtral", build("mixtral", 1), options.pop("act_order", False))
        change(state)
        return applied(build("mixtral"), state, **options)

    def test_a_missing_part_is_named(self):
        def drop(state):
            for name in list(state):
                if name.startswith(original_name("mixtral", 1, 3, "down")):
                    del state[name]

        with pytest.raises(
            ValueError, match=r"model\.layers\.1\.mlp\.experts\.3\.down_proj: missing in the checkpoint"
        ):
            self.damaged(drop)

    def test_one_expert_too_many(self):
        def add(state):
            qw = gptq_tensors(affine.quantize(torch.ones(96, 64), SCHEME), v2=True)
            state |= {f"model.layers.7.block_sparse_moe.experts.0.w1.{key}": value for key, value in qw.items()}

        with pytest.raises(ValueError, match=r"no place for 1 .*model\.layers\.7\.mlp\.experts"):
            self.damaged(add)

    def test_gate_and_up_in_another_order(self):
        def shuffle(state):
            name = f"{original_name('mixtral', 0, 1, 'up')}.g_idx"
            state[name] = state[name].flip(0)

        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: gate_up: g_idx: expected the same"):
            self.damaged(shuffle, act_order=True, config={"desc_act": True})

    def test_a_wrong_shape_is_named(self):
        def cut(state):
            name = f"{original_name('mixtral', 0, 2, 'gate')}.qweight"
            state[name] = state[name][:, :40].contiguous()

        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.2\.gate_proj\.qweight"):
            self.damaged(cut)

    def test_two_names_for_one_tensor(self):
        def repeat(state):
            state["model.layers.0.mlp.gate.weight"] = torch.ones(4, 64)

        with pytest.raises(ValueError, match=r"is a second tensor for model\.layers\.0\.mlp\.gate\.weight"):
            self.damaged(repeat)


def test_biases_of_experts_come_along():
    source = build("mixtral", 1)
    state = checkpoint_of("mixtral", source)
    parts = [(expert, part) for expert in range(4) for part in ("gate", "up", "down")]
    names = {f"{original_name('mixtral', 0, *each)}.bias": 64 if each[1] == "down" else 96 for each in parts}
    zeros = {name: torch.zeros(size) for name, size in names.items()}
    tokens = torch.randint(3, 96, (1, 5))
    plain = applied(build("mixtral"), state)
    assert torch.equal(applied(build("mixtral"), state | zeros)(tokens).logits, plain(tokens).logits)
    bias = torch.randn(96)
    quantized = applied(build("mixtral"), state | zeros | {f"{original_name('mixtral', 0, 2, 'up')}.bias": bias})
    module = experts_of(quantized)["model.layers.0.mlp.experts"]
    assert torch.equal(module._gate_up_bias[2, 96:], bias)
    assert module._gate_up_bias.count_nonzero() == 96
    assert module._down_bias is None


def gpt_oss_checkpoint(model, halves):
    """GPTQ tensors of the experts of `model`, a gpt-oss, whose parameters alternate rows of gate and up.

    With `halves`, "gate_proj" is the first half of these rows and "up_proj" the second, as GPTQModel writes them.
    """
    state = {}
    for layer, block in enumerate(model.model.layers):
        module = block.mlp.experts
        for expert in range(module.num_experts):
            both, bias = module.gate_up_proj[expert].t(), module.gate_up_proj_bias[expert]
            half = len(both) // 2
            gate, up = (slice(0, half), slice(half, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
            parts = {"gate": (both[gate], bias[gate]), "up": (both[up], bias[up])}
            parts["down"] = module.down_proj[expert].t(), module.down_proj_bias[expert]
            for part, (weight, own_bias) in parts.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                tensors = gptq_tensors(affine.quantize(weight, SCHEME), v2=True)
                state |= {f"{name}.{key}": value for key, value in tensors.items()} | {f"{name}.bias": own_bias.clone()}
    return state


@pytest.mark.parametrize(("quantizer", "halves"), [(["gptqmodel:7.7.0"], True), (["ipex_quant"], False), (None, False)])
def test_halves_of_alternating_rows_are_told_by_the_quantizer(quantizer, halves):
    options = {**SIZES, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 16}
    source = random_model(transformers.GptOssForCausalLM, options, 1)
    config = {"meta": {"quantizer": quantizer}}
    quantized = applied(source, gpt_oss_checkpoint(source, halves), config=config)
    for layer, module in enumerate(experts_of(quantized).values()):
        own = source.model.layers[layer].mlp.experts
        for expert in range(4):
            expected = affine.dequantize(affine.quantize(own.gate_up_proj[expert].t(), SCHEME))
            gate, up = affine.dequantize(module.quantized_stack("gate_up")[expert]).chunk(2)
            torch.testing.assert_close(gate, expected[::2], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(up, expected[1::2], rtol=1e-3, atol=1e-4)
        biases = module._gate_up_bias.view(4, 2, -1).transpose(1, 2).flatten(1)
        assert torch.equal(biases, own.gate_up_proj_bias)
