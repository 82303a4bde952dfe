"""`llm.optimize` with everything around the quantized linears."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import ipex_quant as ipex
from ipex_quant.llm.cache.layers import NativeLayer
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.decoder.layer import FusedLayer
from ipex_quant.llm.native import native_stack, parts_of
from ipex_quant.nn import Int8Linear
from ipex_quant.nn.fused_forward import fused_forward
from ipex_quant.quantization import (
    WoqWeightDtype,
    calibrate,
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    gptq,
    prepare,
)

TOKENS = torch.tensor([[5, 9, 17, 33, 4, 8], [7, 3, 90, 12, 61, 25]])


def int4():
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)


def generated(model, **options):
    return model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=6, do_sample=False, **options)


def cache_of(model):
    with torch.inference_mode():
        return model(TOKENS)[CACHE]


def test_without_quantization_the_model_is_native_and_says_the_same(llama):
    model = ipex.llm.optimize(llama)
    assert [(part.sort, len(part.native), part.stock) for part in parts_of(model)] == [
        ("decoder layers", 2, ()),
        ("norms", 5, ()),
        ("attention modules", 2, ()),
    ]
    assert not any(part.native for part in parts_of(llama))
    assert torch.equal(generated(model), generated(llama))
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, llama(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_second_call_changes_nothing(llama):
    once = ipex.llm.optimize(llama, quantization_config=int4())
    twice = ipex.llm.optimize(once)
    with torch.inference_mode():
        assert torch.equal(once(TOKENS).logits, twice(TOKENS).logits)
    assert len(twice._forward_pre_hooks) == len(once._forward_pre_hooks) == 2  # for tuples and for native caches


def test_keys_and_values_are_stored_as_asked(llama):
    assert {layer._buffers[0].dtype for layer in cache_of(ipex.llm.optimize(llama)).layers} == {torch.float32}
    for dtype in (torch.int8, torch.bfloat16):
        layers = cache_of(ipex.llm.optimize(llama, kv_cache_dtype=dtype)).layers
        assert {layer._buffers[0].dtype for layer in layers} == {dtype}
    for named in (torch.int8, "int8"):
        model = ipex.llm.optimize(llama)
        model.config.kv_cache_dtype = named
        assert {layer._buffers[0].dtype for layer in cache_of(model).layers} == {torch.int8}


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int32, "nothing"])
def test_another_type_of_keys_is_refused(llama, dtype):
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match="kv_cache_dtype: expected None"):
        ipex.llm.optimize(llama, quantization_config=int4(), inplace=True, kv_cache_dtype=dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    model = ipex.llm.optimize(llama)
    model.config.kv_cache_dtype = dtype
    with pytest.raises(ValueError, match="kv_cache_dtype: expected None"):
        generated(model)


def test_seconds_of_every_token(llama):
    model = ipex.llm.optimize(llama)
    model.config.token_latency = True
    output, seconds = generated(model)
    assert len(seconds) == output.shape[1] - TOKENS.shape[1]
    assert min(seconds) > 0


def test_a_copy_and_a_pickled_model_are_native_on_their_own(llama):
    model = ipex.llm.optimize(llama, quantization_config=int4())
    expected = generated(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = [module for module in other.modules() if isinstance(fused_forward(module), FusedLayer)]
        assert len(layers) == 2
        assert layers[0].forward.module is layers[0]
        assert torch.equal(generated(other), expected)


def test_an_optimized_model_is_calibrated_layer_by_layer(llama):
    mapping = get_smooth_quant_qconfig_mapping(alpha=0.5)
    found = []
    for model in (llama, ipex.llm.optimize(llama)):
        prepared = prepare(model, mapping, example_inputs=TOKENS)
        quantized = ipex.llm.optimize(convert(calibrate(prepared, [(TOKENS,)])))
        found.append({n: m.activation.scale for n, m in quantized.named_modules() if isinstance(m, Int8Linear)})
        assert parts_of(quantized)[0].native
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_gptq_of_an_optimized_model(llama, tmp_path):
    model = ipex.llm.optimize(llama)
    gptq(model, [{"input_ids": TOKENS}], group_size=32, nsamples=2, pad_max_length=6, save_dir=tmp_path)
    assert parts_of(model)[0].native  # as before


def test_any_module_has_native_norms():
    model = nn.Sequential(nn.Linear(64, 64), transformers.models.llama.modeling_llama.LlamaRMSNorm(64)).eval()
    optimized = ipex.llm.optimize(model, quantization_config=int4())
    assert fused_forward(optimized[1])
    assert native_stack(optimized) == (False, None)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(optimized[1](x), model[1](x))


def test_norms_with_another_dtype_than_their_input_stay_stock():
    model = nn.Sequential(transformers.models.llama.modeling_llama.LlamaRMSNorm(64)).eval().bfloat16()
    optimized = ipex.llm.optimize(model, dtype=torch.bfloat16)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(optimized(x), model(x))
        assert optimized(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_a_saved_model_is_native_again(llama, dtype, tmp_path):
    model = ipex.llm.optimize(llama, quantization_config=int4(), kv_cache_dtype=dtype)
    ipex.llm.save(model, tmp_path)
    for loaded in (ipex.llm.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert native_stack(loaded) == (True, dtype)
        assert torch.equal(generated(loaded), generated(model))
        with torch.inference_mode():
            assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_the_type_of_keys_in_the_configuration_is_saved(llama, tmp_path):
    model = ipex.llm.optimize(llama, quantization_config=int4())
    model.config.kv_cache_dtype = torch.int8
    ipex.llm.save(model, tmp_path)
    loaded = ipex.llm.load(tmp_path)
    assert all(layer._buffers[0].dtype == torch.int8 for layer in cache_of(loaded).layers)


def test_a_converted_model_is_loaded_stock(llama, tmp_path):
    ipex.llm.save(convert(prepare(llama, int4())), tmp_path)
    loaded = ipex.llm.load(tmp_path)
    assert native_stack(loaded) == (False, None)
    assert not parts_of(loaded)[0].native


def test_a_configuration_to_calibrate_leaves_the_model_stock(llama):
    mapping = get_smooth_quant_qconfig_mapping(alpha=0.5)
    assert not parts_of(ipex.llm.optimize(llama, quantization_config=mapping))[0].native


@torch.enable_grad()
def test_calls_with_gradients_run_stock_code(llama):
    model = ipex.llm.optimize(llama)
    model(TOKENS).logits.sum().backward()
    llama(TOKENS).logits.sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, llama.lm_head.weight.grad, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer, NativeLayer) for layer in model(TOKENS)[CACHE].layers)


def test_explain_tells_what_is_native(llama, capsys):
    ipex.explain(ipex.llm.optimize(llama, quantization_config=int4()))
    assert "decoder layers: 2 of 2 native\nnorms: 5 of 5 native\nattention modules: 2 of 2 native\n" in (
        capsys.readouterr().out
    )
    explanation = ipex.explain(llama)
    assert "decoder layers: 0 of 2 native; stock: model.layers.0, model.layers.1" in str(explanation)


def test_the_old_name_warns(llama):
    with pytest.warns(DeprecationWarning, match=r"llm\.optimize"):
        model = ipex.optimize_transformers(llama, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert parts_of(model)[0].native


def test_another_default_dtype_changes_nothing(llama):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = ipex.llm.optimize(llama, quantization_config=int4())
    finally:
        torch.set_default_dtype(torch.float32)
    assert [part.stock for part in parts_of(model)] == [(), (), ()]
    assert torch.equal(generated(model), generated(ipex.llm.optimize(llama, quantization_config=int4())))
