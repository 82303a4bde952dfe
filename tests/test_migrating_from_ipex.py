"""What docs/migrating-from-ipex.md says is raised or warned where IPEX asserts, or says nothing."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant import llm, quantization
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, WoqWeightQScheme

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
STATIC = quantization.get_smooth_quant_qconfig_mapping()
WEIGHT_ONLY = quantization.get_weight_only_quant_qconfig_mapping()
SMALL = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
HEADS = torch.zeros(2, 1, 8)
STARTS = torch.tensor([0, 2])


def model():
    return LlamaForCausalLM(SMALL).eval()


def by_order():
    return QConfigMapping().set_module_name_object_type_order("", nn.Linear, 0, STATIC.global_qconfig)


def prepared():
    return quantization.prepare(nn.Sequential(nn.Linear(8, 8)), STATIC, example_inputs=X)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: llm.optimize(nn.ReLU().eval(), quantization_config=WEIGHT_ONLY), ValueError),
        (lambda: llm.optimize(model().train(), quantization_config=WEIGHT_ONLY), ValueError),
        (lambda: llm.optimize(model(), cache_weight_for_large_batch=True), ValueError),
        (lambda: llm.optimize(model(), device="xpu"), RuntimeError),
        (lambda: llm.optimize(model(), device="cuda"), RuntimeError),
        (lambda: llm.optimize(model(), quantization_config=STATIC, qconfig_summary_file="none.json"), OSError),
        (lambda: llm.optimize(model(), low_precision_checkpoint=({}, {"quant_method": "nobody's"})), ValueError),
        (lambda: llm.utils.load_low_precision_checkpoint(".", 0, 2), ValueError),
        (lambda: quantization.get_smooth_quant_qconfig_mapping(alpha=2), ValueError),
        (lambda: quantization.prepare("model", STATIC), TypeError),
        (lambda: quantization.prepare(nn.Linear(8, 8), "static"), TypeError),
        (lambda: quantization.prepare(nn.Linear(8, 8), STATIC), ValueError),
        (lambda: quantization.prepare(nn.Linear(8, 8), STATIC, X, example_kwarg_inputs={"input": X}), ValueError),
        (lambda: quantization.prepare(nn.Linear(8, 8), by_order(), X), ValueError),
        (lambda: quantization.convert(nn.Linear(8, 8)), RuntimeError),
        (lambda: quantization.convert(prepared()), RuntimeError),
        (lambda: prepared().save_qconf_summary(""), ValueError),
        (lambda: prepared().save_qconf_summary("new.json"), RuntimeError),
        (lambda: prepared().load_qconf_summary("none.json"), OSError),
        (lambda: quantization.gptq(model(), []), ValueError),
        (lambda: llm.modules.RotaryEmbedding(8, 8, extra_rope_config={"unknown": 1}), ValueError),
        (
            lambda: llm.functional.varlen_attention(
                HEADS, HEADS, HEADS, None, STARTS, STARTS, 2, 2, 0.0, None, False, True, True
            ),
            ValueError,
        ),
        (
            lambda: llm.functional.indirect_access_kv_cache_attention(
                HEADS[None], HEADS[None], HEADS[None], 1.0, head_mask=X
            ),
            ValueError,
        ),
        (
            lambda: llm.modules.PagedAttention.reshape_and_cache(
                HEADS, HEADS, HEADS[None], HEADS[None], torch.tensor([0, 1]), "int4"
            ),
            TypeError,
        ),
    ],
)
def test_what_is_raised(call, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: llm.optimize(model(), cache_weight_for_large_batch=True),
        lambda: llm.optimize(model(), low_precision_checkpoint=3),
        lambda: llm.optimize(model(), low_precision_checkpoint=(1, 2, 3)),
        lambda: llm.optimize(model(), low_precision_checkpoint=({}, 3)),
        lambda: llm.optimize(model(), low_precision_checkpoint=({}, {"quant_method": "nobody's"})),
        lambda: llm.utils.load_low_precision_checkpoint("nowhere"),
        lambda: llm.utils.load_low_precision_checkpoint("."),
        lambda: llm.utils.shard_low_precision_checkpoint({}, {}, 0, 2, "gptq", 12, False, 4),
        lambda: llm.quantization.IPEXWeightOnlyQuantizedLinear.from_weight(X, X, X, 8, 2, quant_method=7),
        lambda: quantization.get_weight_only_quant_qconfig_mapping(group_size=3),
        lambda: quantization.get_weight_only_quant_qconfig_mapping(weight_dtype=99),
        lambda: quantization.get_weight_only_quant_qconfig_mapping(
            weight_dtype=WoqWeightDtype.NF4, weight_qscheme=WoqWeightQScheme.ASYMMETRIC
        ),
        lambda: quantization.prepare("model", STATIC),
        lambda: quantization.prepare(nn.Linear(8, 8), "static"),
        lambda: quantization.prepare(nn.Linear(8, 8), STATIC),
        lambda: quantization.prepare(nn.Linear(8, 8), STATIC, X, example_kwarg_inputs={"input": X}),
        lambda: quantization.prepare(nn.Linear(8, 8), STATIC, example_kwarg_inputs=X),
        lambda: quantization.convert("model"),
        lambda: quantization.convert(nn.Linear(8, 8)),
        lambda: prepared().save_qconf_summary(None),
    ],
)
def test_what_ipex_asserts_is_an_assertion_error_too(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError) as found:
        call()
    assert isinstance(found.value, (ValueError, TypeError, RuntimeError))


@pytest.mark.parametrize("dtype", [WoqWeightDtype.NF4, WoqWeightDtype.FP8])
def test_combinations_that_do_not_exist(dtype):
    with pytest.raises(ValueError, match="Asymmetric quantization"):
        quantization.get_weight_only_quant_qconfig_mapping(
            weight_dtype=dtype, lowp_mode=WoqLowpMode.NONE, weight_qscheme=WoqWeightQScheme.ASYMMETRIC
        )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: llm.optimize(model().train()), "training mode"),
        (lambda: ipex.optimize_transformers(model()), "llm.optimize"),
        (lambda: quantization.get_weight_only_quant_qconfig_mapping(weight_dtype=torch.qint8), "WoqWeightDtype.INT8"),
        (lambda: quantization.prepare(nn.Linear(8, 8), WEIGHT_ONLY.global_qconfig), "QConfigMapping"),
        (lambda: quantization.convert(quantization.prepare(nn.ReLU(), WEIGHT_ONLY)), "stays in float"),
    ],
)
def test_what_is_warned_of(call, match):
    with pytest.warns(match=match):
        call()


def test_a_name_that_the_model_lacks_is_warned_of():
    mapping = quantization.get_weight_only_quant_qconfig_mapping().set_module_name("nobody", None)
    with pytest.warns(match="no module"):
        quantization.prepare(nn.Linear(8, 8), mapping)
