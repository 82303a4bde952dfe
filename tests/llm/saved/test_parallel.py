import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.llm.saved.parallel import Share, columns_of
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import PER_CHANNEL, WeightScheme
from ipex_quant.quantization import (
    WoqWeightDtype,
    convert,
    default_dynamic_qconfig_mapping,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

from ...ops.weights import KINDS, make, shuffle_features, stored_schemes

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BIASED = {"attention_bias": True, "mlp_bias": True}
TOKENS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
EXACT = ("int4", "int8", "part_in_float")
INT8_ACTIVATIONS = ("dynamic", "static")


def model_of(name="Llama", **options):
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = model_class(model_class.config_class(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


def weight_only(model, dtype=torch.float32, in_float=(), **options):
    mapping = get_weight_only_quant_qconfig_mapping(**options)
    for name in in_float:
        mapping.set_module_name(name, None)
    return ipex.llm.optimize(model, dtype=dtype, quantization_config=mapping, inplace=True)


def int4(model, **options):
    return weight_only(model, weight_dtype=WoqWeightDtype.INT4, group_size=32, **options)


def int8(model, mapping):
    prepared = prepare(model, mapping, example_kwarg_inputs={"input_ids": TOKENS})
    prepared(TOKENS)
    return convert(prepared)


def act_order(model, *names):
    for name in names:
        layer = model.get_submodule(name)
        weight = shuffle_features(layer.quantized_weight())
        model.set_submodule(name, WeightOnlyQuantizedLinear.from_quantized_weight(weight, layer.float_bias))
    return model


def models():
    down, attention = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn"
    in_float = (down, f"{attention}.q_proj", f"{attention}.o_proj")
    return {
        "int4": act_order(int4(model_of()), "model.layers.0.self_attn.q_proj"),
        "int8": weight_only(model_of(**BIASED)),
        "part_in_float": int4(model_of(**BIASED, tie_word_embeddings=True), in_float=in_float),
        "dynamic": int8(model_of(**BIASED), default_dynamic_qconfig_mapping),
        "static": int8(model_of(**BIASED), get_smooth_quant_qconfig_mapping()),
        "bfloat16": int4(model_of(**BIASED), dtype=torch.bfloat16),
        "act_order": act_order(int4(model_of()), down),
        "odd_groups": int4(model_of(intermediate_size=96)),
        "odd_features": weight_only(model_of(intermediate_size=63)),
        "one_key_head": int4(model_of(num_key_value_heads=1)),
        "experts": int4(model_of("Mixtral", num_local_experts=4)),
        "undivided": int4(model_of("Phi3")),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    (root / "out").mkdir()
    with torch.no_grad():
        for name, model in models().items():
            ipex.llm.save(model, root / "models" / name)
    return root


@pytest.fixture(scope="module")
def ranks(root):
    """The results of two processes with all the models."""
    out = root / "out"
    torch.save(TOKENS, out / "tokens.pt")
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(
        [*command, str(root / "models"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def whole(root, name, **options):
    model = ipex.llm.from_pretrained(root / "models" / name, **options)
    with torch.inference_mode():
        tokens = model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return model(TOKENS).logits, tokens


@pytest.mark.parametrize("name", [*EXACT, *INT8_ACTIVATIONS, "bfloat16"])
def test_all_processes_have_the_same_results(ranks, name):
    first, second = (found[name] for found in ranks)
    assert torch.equal(first["logits"], second["logits"])
    assert torch.equal(first["tokens"], second["tokens"])


@pytest.mark.parametrize("name", EXACT)
def test_the_results_are_those_of_the_whole_model(root, ranks, name):
    logits, tokens = whole(root, name)
    torch.testing.assert_close(ranks[0][name]["logits"], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ranks[0][name]["tokens"], tokens)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in INT8_ACTIVATIONS), ("bfloat16", {"kv_cache_dtype": torch.int8})],
)
def test_activations_of_few_bits_round_elsewhere(root, ranks, name, options):
    logits, _ = whole(root, name, **options)
    error = (ranks[0][name]["logits"] - logits).float().norm() / logits.float().norm()
    assert error < 0.05


def test_each_process_has_half_of_the_planned_layers(ranks):
    for found in ranks:
        assert found["int8"]["linears"] == {
            "self_attn.q_proj": (32, 64, True),
            "self_attn.k_proj": (16, 64, True),
            "self_attn.v_proj": (16, 64, True),
            "self_attn.o_proj": (64, 32, False),  # the bias is added to the sum
            "mlp.gate_proj": (64, 64, True),
            "mlp.up_proj": (64, 64, True),
            "mlp.down_proj": (64, 64, False),
        }
        assert found["int8"]["fused"] == "FusedLayer"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("act_order", "model.layers.0.mlp.down_proj: tensor parallelism: act-order (g_idx) spreads the groups"),
        ("odd_groups", "mlp.down_proj: tensor parallelism: expected whole groups of 32 input features in each process"),
        ("odd_features", "mlp.gate_proj: tensor parallelism: expected output features that 2 processes divide, got 63"),
        ("one_key_head", "k_proj: tensor parallelism: expected a number of heads that 2 processes divide, got 1"),
        ("experts", "mlp.experts: tensor parallelism: cannot divide a WeightOnlyQuantizedExperts as 'moe_tp_experts'"),
        ("undivided", "the plan of Phi3ForCausalLM divides no layer"),
    ],
)
def test_layers_that_cannot_be_divided_are_named(ranks, name, message):
    for found in ranks:
        assert message in found[name]


@pytest.mark.parametrize("action", ["save", "save_pretrained", "export", "dequantize"])
def test_a_part_of_a_model_is_not_taken_for_the_model(ranks, action):
    for found in ranks:
        assert "has only its part of a model that is divided among 2" in found["refusals"][action]


def test_there_are_no_gradients(ranks):
    assert all("RuntimeError: tensor parallelism" in found["refusals"]["backward"] for found in ranks)


def test_one_process_has_the_whole_model(root):
    model = ipex.llm.load(root / "models" / "int4", tp_plan="auto")
    expected, _ = whole(root, "int4")
    assert torch.equal(model(TOKENS).logits, expected)


def test_other_plans_and_sources_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="tp_plan: expected 'auto' or None, got 'colwise'"):
        ipex.llm.load(root / "models" / "int4", tp_plan="colwise")
    model_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no model that"):
        ipex.llm.from_pretrained(tmp_path, tp_plan="auto")


PLAIN = [WeightScheme(dtype, symmetric, size) for dtype, symmetric in KINDS for size in (16, PER_CHANNEL)]


@pytest.mark.parametrize("scheme", PLAIN + stored_schemes(16, 32), ids=str)
def test_columns_of_every_scheme_keep_their_values(scheme):
    weight = make(5, 96 if scheme.group_size == 16 else 9, scheme)
    share = Share(2, 3)
    size = weight.shape[1] // 3
    assert torch.equal(affine.dequantize(columns_of(weight, share)), affine.dequantize(weight)[:, 2 * size :])


def test_super_groups_are_not_split():
    weight = make(5, 96, WeightScheme(WoqWeightDtype.INT4, True, 16, super_group_size=32))
    with pytest.raises(ValueError, match="expected whole groups of 32 input features in each process, got 96"):
        columns_of(weight, Share(0, 2))


def test_columns_of_an_odd_number_of_codes_are_repacked():
    weight = make(3, 6, WeightScheme(WoqWeightDtype.INT4))
    parts = [columns_of(weight, Share(rank, 2)) for rank in (0, 1)]
    assert [part.codes.shape for part in parts] == [(3, 2), (3, 2)]
    joined = torch.cat([affine.dequantize(part) for part in parts], dim=1)
    assert torch.equal(joined, affine.dequantize(weight))
