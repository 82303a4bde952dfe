import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.nn import Int8Conv, Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping


def rows(model):
    return {row.module: row for row in ipex.explain(model).rows}


@pytest.fixture
def mapping():
    return get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    ).set_module_name("lm_head", None)


def test_every_module_with_a_matrix_has_a_row(make_model, mapping):
    found = rows(ipex.llm.optimize(make_model("qwen3_moe"), dtype=torch.bfloat16, quantization_config=mapping))
    layer = "model.layers.0"
    assert list(found)[:4] == ["model.embed_tokens", *(f"{layer}.self_attn.{name}_proj" for name in "qkv")]
    row = found[f"{layer}.self_attn.q_proj"]
    assert (row.scheme, row.shape, row.compute) == ("int4 asym g32", (64, 64), "int8 (per_batch_ic_block_sym)")
    assert row.isa == ipex.ops.isa_name()
    assert row.kernel
    assert row.reason == ""
    assert 64 * 64 // 2 < row.nbytes < 64 * 64
    row = found[f"{layer}.mlp.experts"]
    assert (row.scheme, row.shape, row.kernel) == ("int4 asym g32", (4, 48, 64), "int8 dot, routed experts")
    assert found["lm_head"].reason == "the mapping's set_module_name('lm_head') is None"
    assert found["lm_head"].nbytes == 96 * 64 * 2
    assert found["model.embed_tokens"].reason == "embeddings need a rule of their own"
    assert f"{layer}.input_layernorm" not in found


def test_the_table(llama, mapping, capsys):
    explanation = ipex.explain(ipex.llm.optimize(llama, quantization_config=mapping))
    text = str(explanation)
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    assert lines[0].split() == ["module", "scheme", "shape", "compute", "kernel", "isa", "bytes", "why", "float"]
    assert len(lines) == 1 + 16 + 1 + 3
    assert "96x64" in text
    assert lines[17].startswith("14 modules quantized, ")
    assert repr(explanation) == f"<{lines[17]}>"


def test_compute_modes(mapping):
    model = nn.Sequential(nn.Linear(64, 64))
    for mode, expected in [(WoqLowpMode.NONE, "float32"), (WoqLowpMode.BF16, "bf16"), (WoqLowpMode.FP16, "fp16")]:
        mapping = get_weight_only_quant_qconfig_mapping(lowp_mode=mode)
        converted = ipex.quantization.convert(ipex.quantization.prepare(model, mapping))
        assert rows(converted)["0"].compute == expected
    assert rows(converted.to(torch.bfloat16))["0"].compute == "fp16"


def test_int8_modules():
    def linears(activation, count):
        weights = [quantize_per_channel(torch.randn(8, 4)) for _ in range(count)]
        return Int8Linear.make_group(weights, [None] * count, activation, torch.float32)

    static = StaticActivation(0.5, 3)
    model = nn.ModuleDict(dict(zip(("q_proj", "k_proj", "v_proj"), linears(static, 3), strict=True)))
    model["o_proj"] = linears(StaticActivation(0.5, 3, torch.ones(4)), 1)[0]
    model["head"] = linears(None, 1)[0]
    model["conv"] = Int8Conv.from_float(nn.Conv2d(3, 4, 5), static)
    model["depthwise"] = Int8Conv.from_float(nn.Conv1d(4, 8, 5, groups=4), static)
    found = rows(nn.ModuleDict({"attention": model}))
    assert {name.partition(".")[2]: row.compute for name, row in found.items()} == {
        "q_proj": "int8 (static per-tensor), fused with k_proj, v_proj",
        "k_proj": "int8 (static per-tensor), fused with q_proj, v_proj",
        "v_proj": "int8 (static per-tensor), fused with q_proj, k_proj",
        "o_proj": "int8 (static per-tensor, smoothed)",
        "head": "int8 (per token)",
        "conv": "int8 (static per-tensor)",
        "depthwise": "int8 (static per-tensor)",
    }
    row = found["attention.q_proj"]
    assert (row.scheme, row.shape, row.kernel) == ("int8 sym per-channel", (8, 4), "int8 dot")
    assert (row.isa, row.nbytes, row.reason) == (ipex.ops.isa_name(), model["q_proj"].nbytes, "")
    conv, depthwise = found["attention.conv"], found["attention.depthwise"]
    assert (conv.scheme, conv.shape, conv.kernel) == ("int8 sym per-channel", (4, 3, 5, 5), "int8 dot")
    assert (depthwise.shape, depthwise.kernel) == ((8, 1, 5), "int8 depthwise")
    assert conv.isa == depthwise.isa == ipex.ops.isa_name()


def test_modules_nobody_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3), WeightOnlyQuantizedLinear(4, 4), nn.LayerNorm(4))
    found = rows(model)
    assert found["0"].reason == "not asked to be quantized"
    assert found["1"].reason == "Conv1d is no linear layer"
    assert found["2"].reason == "it has no weight yet"
    assert "3" not in found
