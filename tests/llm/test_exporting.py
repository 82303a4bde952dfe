"""`export`: what another tool's format holds comes back with the same logits; anything else is refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ipex_quant as ipex
from ipex_quant.checkpoints.writers import WRITERS
from ipex_quant.llm import exporting
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import PER_CHANNEL
from ipex_quant.quantization import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    convert,
    default_dynamic_qconfig_mapping,
    default_static_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

KINDS = {
    "int4_asym": {"weight_dtype": WoqWeightDtype.INT4, "weight_qscheme": WoqWeightQScheme.ASYMMETRIC},
    "int4_sym": {"weight_dtype": WoqWeightDtype.INT4, "weight_qscheme": WoqWeightQScheme.SYMMETRIC},
    "int8": {"weight_dtype": WoqWeightDtype.INT8, "weight_qscheme": WoqWeightQScheme.SYMMETRIC},
    "fp8": {"weight_dtype": WoqWeightDtype.FP8, "weight_qscheme": WoqWeightQScheme.SYMMETRIC},
}
INT8 = {"lowp_mode": WoqLowpMode.INT8, "act_quant_mode": WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM}


def mapping(kind, group_size=32, **options):
    return get_weight_only_quant_qconfig_mapping(**KINDS[kind], group_size=group_size, **options)


def without(mapping, *names):
    for name in names:
        mapping.set_module_name(name, None)
    return mapping


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt", "gpt2", "qwen3_moe", "t5"])
def test_the_logits_come_back(name, kind, form, make_model, logits, tmp_path):
    if (form, kind) in {("gptq", "fp8"), ("awq", "int8"), ("awq", "fp8")}:
        pytest.skip("the format has no such weights")
    config = mapping(kind, group_size=16, **INT8)
    if form == "awq":
        config = without(config, "lm_head")
    model = ipex.llm.optimize(make_model(name), quantization_config=config)
    ipex.llm.export(model, tmp_path / "out", form)
    back = ipex.llm.from_pretrained(tmp_path / "out", quantization_config=config)
    assert torch.equal(logits(back), logits(model))
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == form
    if name == "llama_tied":
        assert config_of(tmp_path / "out")["tie_word_embeddings"] == (form == "awq")


def test_without_a_configuration_too(llama, logits, tmp_path):
    model = ipex.llm.optimize(llama, quantization_config=mapping("int4_sym"))
    ipex.llm.export(model, tmp_path / "out", "gptq")
    assert torch.equal(logits(ipex.llm.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_act_order_and_layers_that_differ(form, llama, make_model, tokens, logits, tmp_path):
    ids = [{"input_ids": tokens(llama)["input_ids"]}]
    ipex.quantization.gptq(llama, ids, group_size=16, act_order=True, save_dir=tmp_path / "gptq")
    checkpoint = ipex.llm.utils.load_low_precision_checkpoint(tmp_path / "gptq")
    model = ipex.llm.optimize(make_model("llama"), low_precision_checkpoint=checkpoint)
    head = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)
    model = ipex.llm.optimize(model, quantization_config=head, inplace=True)
    assert model.lm_head.scheme.group_size == PER_CHANNEL
    assert model.model.layers[0].mlp.up_proj.describe()["act_order"]
    ipex.llm.export(model, tmp_path / "out", form)
    back = ipex.llm.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("static", [False, True])
def test_int8_inputs(static, llama, tokens, logits, tmp_path):
    config = default_static_qconfig_mapping if static else default_dynamic_qconfig_mapping
    prepared = prepare(llama, config, example_kwarg_inputs=tokens(llama))
    prepared(**tokens(llama))
    model = ipex.llm.optimize(convert(prepared))
    ipex.llm.export(model, tmp_path / "out", "compressed-tensors")
    back = ipex.llm.from_pretrained(tmp_path / "out")
    assert isinstance(back.model.layers[0].mlp.up_proj, Int8Linear)
    assert torch.equal(logits(back), logits(model))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: it quantizes its input to 8 bits, GPTQ does not"):
        ipex.llm.export(model, tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()


def test_layers_in_float_are_named(llama, logits, tmp_path):
    config = without(mapping("int4_asym"), "lm_head", "model.layers.0.mlp.down_proj")
    model = ipex.llm.optimize(llama, quantization_config=config)
    for form in WRITERS:
        ipex.llm.export(model, tmp_path / form, form)
        assert torch.equal(logits(ipex.llm.from_pretrained(tmp_path / form)), logits(model))
    found = {form: config_of(tmp_path / form)["quantization_config"] for form in WRITERS}
    names = ["model.layers.0.mlp.down_proj", "lm_head"]
    assert found["awq"]["modules_to_not_convert"] == found["compressed-tensors"]["ignore"] == names
    assert found["gptq"]["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}
    assert found["gptq"] == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())


def test_quantized_embeddings_become_what_lookups_return(llama, logits, tmp_path):
    config = mapping("int4_asym")
    config.set_object_type(torch.nn.Embedding, mapping("int8").global_qconfig)
    model = ipex.llm.optimize(llama, dtype=torch.bfloat16, quantization_config=config)
    with pytest.warns(UserWarning, match=r"embeddings are in float in this format: model.embed_tokens"):
        ipex.llm.export(model, tmp_path / "out", "gptq")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert torch.equal(logits(ipex.llm.from_pretrained(tmp_path / "out")), logits(model))


def test_names_are_those_of_published_checkpoints(logits, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **options)).eval()
    model = ipex.llm.optimize(model, quantization_config=mapping("int4_sym"))
    ipex.llm.export(model, tmp_path / "out", "gptq")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.qweight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    dynamic = config_of(tmp_path / "out")["quantization_config"]["dynamic"]
    assert dynamic == {r"-:^model\.layers\.0\.block_sparse_moe\.gate$": {}}
    assert torch.equal(logits(ipex.llm.from_pretrained(tmp_path / "out")), logits(model))


def test_large_checkpoints_are_several_files(llama, logits, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    model = ipex.llm.optimize(llama, quantization_config=mapping("int4_sym"))
    ipex.llm.export(model, tmp_path / "out", "gptq")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {name: tensor.nbytes for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(stored.values())
    assert torch.equal(logits(ipex.llm.from_pretrained(tmp_path / "out")), logits(model))


def test_the_dtype_of_the_model_and_float32_biases_stay(make_model, logits, tmp_path):
    model = ipex.llm.optimize(make_model("opt"), dtype=torch.bfloat16, quantization_config=mapping("int4_sym"))
    layer = next(each for each in model.modules() if isinstance(each, WeightOnlyQuantizedLinear))
    assert not torch.equal(layer.float_bias.bfloat16().float(), layer.float_bias)
    ipex.llm.export(model, tmp_path / "out", "gptq")
    back = ipex.llm.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.bfloat16
    assert torch.equal(logits(back), logits(model))


def test_bad_arguments(llama, tmp_path):
    with pytest.raises(ValueError, match=r"model: expected quantized linear layers, found none"):
        ipex.llm.export(llama, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match=r"format: expected one of \['gptq', 'awq', 'compressed-tensors'.*got 'hqq'"):
        ipex.llm.export(llama, tmp_path / "out", "hqq")
    with pytest.raises(TypeError, match=r"model: expected a transformers model, got Linear"):
        ipex.llm.export(torch.nn.Linear(2, 2), tmp_path / "out", "gptq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=r"directory: .*full exists and is not empty"):
        ipex.llm.export(llama, tmp_path / "full", "gptq")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_modules_that_no_format_holds(tmp_path):
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = ipex.llm.optimize(transformers.JetMoeForCausalLM(config).eval(), quantization_config=mapping("int4_sym"))
    with pytest.raises(ValueError, match=r"no other format holds a WeightOnlyQuantizedExpertLinears; leave"):
        ipex.llm.export(model, tmp_path / "out", "gptq")
