import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.ao.quantization import QConfigMapping

import ipex_quant as ipex
from ipex_quant.nn import WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping


def int4(**options):
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32, **options)


def quantized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightOnlyQuantizedLinear)}


def dequantized(model, quantized_model):
    """The float model with the quantized one's weights."""
    reference = copy.deepcopy(model)
    for name, module in quantized(quantized_model).items():
        weight = affine.dequantize(module.quantized_weight())
        layer = reference.get_submodule(name)
        layer.weight = nn.Parameter(weight if isinstance(layer, nn.Linear) else weight.t())
    for name, module in quantized_model.named_modules():
        if isinstance(module, WeightOnlyQuantizedExperts):
            gate, up, down = module.dequantized_weight(torch.float32).chunk(3, dim=1)
            experts = reference.get_submodule(name)
            experts.gate_up_proj.data, experts.down_proj.data = torch.cat((gate, up), dim=1), down.transpose(1, 2)
    return reference


def test_any_model_computes_what_its_quantized_weights_say(any_model, logits):
    optimized = ipex.llm.optimize(any_model, quantization_config=int4())
    names = [name for name, module in any_model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert list(quantized(optimized)) == names
    assert not quantized(any_model)
    torch.testing.assert_close(logits(optimized), logits(dequantized(any_model, optimized)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(optimized), logits(any_model), atol=1e-3)


@pytest.mark.parametrize("beams", [1, 2])
def test_any_model_generates(any_model, beams):
    mapping = int4(lowp_mode=WoqLowpMode.INT8)
    model = ipex.llm.optimize(any_model, dtype=torch.bfloat16, quantization_config=mapping, inplace=True)
    tokens = torch.randint(3, 96, (2, 5))
    output = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, num_beams=beams, do_sample=False
    )
    assert len(output) == 2
    assert output.shape[1] > 1
    assert model.dtype == torch.bfloat16


def test_greedy_tokens_are_those_of_the_dequantized_model(llama):
    optimized = ipex.llm.optimize(llama, quantization_config=int4())
    tokens = torch.randint(3, 96, (2, 5))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    expected = dequantized(llama, optimized).generate(tokens, **options)
    assert torch.equal(optimized.generate(tokens, **options), expected)


def test_inplace_returns_the_model_itself(llama):
    assert ipex.llm.optimize(llama, quantization_config=int4(), inplace=True) is llama
    assert len(quantized(llama)) == 15


def test_without_inplace_the_model_is_unchanged(llama, logits):
    before = logits(llama)
    ipex.llm.optimize(llama, dtype=torch.bfloat16, quantization_config=int4())
    assert torch.equal(logits(llama), before)
    assert llama.dtype == torch.float32
    assert not hasattr(llama.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rest_is_cast(llama, logits, dtype):
    optimized = ipex.llm.optimize(llama, dtype=dtype, quantization_config=int4())
    assert {p.dtype for p in optimized.parameters()} == {dtype}
    assert logits(optimized).dtype == dtype
    assert optimized.model.rotary_emb.inv_freq.dtype == torch.float32


def test_without_a_configuration_only_the_dtype_changes(llama):
    optimized = ipex.llm.optimize(llama, dtype=torch.bfloat16)
    assert not quantized(optimized)
    assert optimized.dtype == torch.bfloat16
    assert llama.dtype == torch.float32
    assert ipex.llm.optimize(llama, dtype=torch.bfloat16, inplace=True) is llama


def test_the_mapping_can_exclude_lm_head(llama):
    optimized = ipex.llm.optimize(llama, quantization_config=int4().set_module_name("lm_head", None))
    assert type(optimized.lm_head) is nn.Linear
    assert len(quantized(optimized)) == 14


@pytest.mark.parametrize("inplace", [False, True])
def test_a_tied_output_layer_is_quantized_and_the_embedding_stays(make_model, logits, inplace):
    model = make_model("llama_tied")
    embedding = model.model.embed_tokens.weight.clone()
    optimized = ipex.llm.optimize(model, quantization_config=int4(), inplace=inplace)
    assert isinstance(optimized.lm_head, WeightOnlyQuantizedLinear)
    assert torch.equal(optimized.model.embed_tokens.weight, embedding)
    before = logits(optimized)
    optimized.tie_weights()
    assert torch.equal(logits(optimized), before)
    assert optimized.resize_token_embeddings(None) is optimized.model.embed_tokens
    assert optimized.resize_token_embeddings(96) is optimized.model.embed_tokens
    assert torch.equal(logits(optimized), before)
    if not inplace:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.all_tied_weights_keys


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_tokens_can_be_added_and_taken_away(make_model, logits, tmp_path, name):
    optimized = ipex.llm.optimize(make_model(name), quantization_config=int4())
    before = logits(optimized)
    with pytest.warns(UserWarning, match="lm_head was quantized and is a float layer now.*optimize.*again"):
        optimized.resize_token_embeddings(100)
    torch.testing.assert_close(logits(optimized)[..., :96], before, rtol=1e-4, atol=1e-4)
    assert type(optimized.get_output_embeddings()) is nn.Linear  # with float rows for the new tokens
    tokens = torch.tensor([[5, 98, 7]])
    generated = optimized.generate(tokens, max_new_tokens=3, do_sample=False)
    ipex.llm.save(optimized, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert torch.equal(loaded.generate(tokens, max_new_tokens=3, do_sample=False), generated)
    again = ipex.llm.optimize(loaded, quantization_config=int4())
    assert isinstance(again.get_output_embeddings(), WeightOnlyQuantizedLinear)
    ipex.llm.save(again, tmp_path / "again")
    for model in (again, copy.deepcopy(again), ipex.llm.load(tmp_path / "again")):
        with pytest.warns(UserWarning, match="lm_head was quantized and is a float layer now"):
            model.resize_token_embeddings(104)
        assert model.get_input_embeddings().num_embeddings == 104
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a head in float stays what it was
        optimized.resize_token_embeddings(90)
    assert optimized(tokens[:, :1]).logits.shape[-1] == 90


def test_a_tied_output_layer_left_in_float_stays_tied(make_model):
    mapping = int4().set_module_name("lm_head", None)
    optimized = ipex.llm.optimize(make_model("llama_tied"), dtype=torch.bfloat16, quantization_config=mapping)
    assert optimized.lm_head.weight is optimized.model.embed_tokens.weight


def test_what_is_left_can_be_quantized_in_a_second_call(llama):
    first = ipex.llm.optimize(llama, quantization_config=int4().set_module_name("lm_head", None))
    int8 = get_weight_only_quant_qconfig_mapping()
    second = ipex.llm.optimize(first, quantization_config=int8)
    assert {module.dtype for module in quantized(first).values()} == {WoqWeightDtype.INT4}
    assert second.lm_head.dtype == WoqWeightDtype.INT8
    with pytest.warns(UserWarning, match="nothing changed: 15 modules are quantized already and stay as they are"):
        third = ipex.llm.optimize(second, quantization_config=int8)
    assert len(third.config.quantization_config["modules"]) == 15


def test_the_configuration_describes_the_modules(llama):
    optimized = ipex.llm.optimize(llama, quantization_config=int4(lowp_mode=WoqLowpMode.INT8), dtype=torch.bfloat16)
    config = optimized.config.quantization_config
    assert (config["quant_method"], config["version"], config["dtype"]) == ("ipex_quant", 1, "bfloat16")
    assert len(config["modules"]) == 15
    assert config["modules"]["lm_head"] == {
        "kind": "weight_only",
        "weight_dtype": "int4",
        "symmetric": False,
        "group_size": 32,
        "act_order": False,
        "bias": False,
        "lowp_mode": "int8",
        "act_quant_mode": "per_batch_ic_block_sym",
    }


def test_cache_weight_for_large_batch_changes_nothing(llama):
    optimized = ipex.llm.optimize(llama, quantization_config=int4(), cache_weight_for_large_batch=True)
    plain = ipex.llm.optimize(llama, quantization_config=int4())
    assert repr(optimized) == repr(plain)
    with pytest.raises(ValueError, match="cache_weight_for_large_batch is only valid"):
        ipex.llm.optimize(llama, cache_weight_for_large_batch=True)


def test_a_training_model_comes_back_with_its_optimizer(llama):
    optimizer = torch.optim.SGD(llama.parameters(), 0.1)
    with pytest.warns(UserWarning, match="returned as it is"):
        assert ipex.llm.optimize(llama, optimizer) == (llama, optimizer)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first and leave out the optimizer"):
        ipex.llm.optimize(llama, optimizer, quantization_config=int4())
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        ipex.llm.optimize(llama.train(), quantization_config=int4())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda"}, RuntimeError, r"Device \[cuda\] is not supported"),
        ({"device": "xpu"}, RuntimeError, r"Device \[xpu\] is not available"),
        ({"dtype": torch.float64}, ValueError, r"dtype: expected torch.float32.*got torch.float64"),
        ({"qconfig_summary_file": "x.json"}, ValueError, "qconfig_summary_file: it goes with a static"),
        (
            {"quantization_config": int4(), "qconfig_summary_file": "x.json"},
            ValueError,
            "qconfig_summary_file: it goes with a static",
        ),
        ({"quantization_config": 4}, TypeError, "should be an instance of QConfigMapping"),
        ({"quantization_config": QConfigMapping()}, ValueError, "none of the 15 linear layers can be quantized"),
    ],
)
def test_bad_arguments_raise(llama, options, error, message):
    with pytest.raises(error, match=message):
        ipex.llm.optimize(llama, **options)


def test_an_xpu_gets_the_model_as_it_is(llama, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(type(llama), "to", lambda self, device: moved.append(device) or self)
    with pytest.raises(RuntimeError, match=r"Device \[xpu\] has no quantized layers"):
        ipex.llm.optimize(llama, device="xpu", quantization_config=int4())
    result = ipex.llm.optimize(llama, dtype=torch.bfloat16, device="xpu")
    assert moved == ["xpu"]
    assert result is not llama
    assert result.dtype == torch.bfloat16
    assert "forward" not in vars(result)
    assert result.config._attn_implementation == llama.config._attn_implementation


def test_a_weight_that_is_not_finite_is_named(llama):
    llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        ipex.llm.optimize(llama, quantization_config=int4())


def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match="not scripted"):
        ipex.llm.optimize(torch.jit.script(nn.Linear(2, 2)), quantization_config=int4())


def test_falcon_is_quantized_and_experts_that_cannot_be_are_warned_about(logits):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).eval()
    optimized = ipex.llm.optimize(falcon, quantization_config=int4())
    assert len(quantized(optimized)) == 5
    torch.testing.assert_close(logits(optimized), logits(dequantized(falcon, optimized)), rtol=1e-4, atol=1e-4)
    config = transformers.MixtralConfig(**sizes, intermediate_size=96, num_key_value_heads=2, num_local_experts=4)
    mixtral = transformers.MixtralForCausalLM(config).eval()
    mixtral.model.layers[0].mlp.experts.act_fn = nn.Tanh()
    with pytest.warns(UserWarning, match=r"^most weights stay in float: the experts in 3-D parameters of 1 modules"):
        ipex.llm.optimize(mixtral, quantization_config=int4())


def test_a_plain_module_is_fine_too():
    optimized = ipex.llm.optimize(nn.Sequential(nn.Linear(64, 8)).eval(), quantization_config=int4())
    assert isinstance(optimized[0], WeightOnlyQuantizedLinear)


def test_llama_compiles_without_a_graph_break(llama, logits):
    model = ipex.llm.optimize(llama, quantization_config=int4())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = torch.randint(3, 96, (2, 5))
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
