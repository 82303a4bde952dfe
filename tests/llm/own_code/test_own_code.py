"""Models whose layers and caches transformers does not have, after `llm.optimize`, `convert`, GPTQ, AWQ and loading."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ipex_quant as ipex
from ipex_quant.llm.native import parts_of
from ipex_quant.llm.utils import load_low_precision_checkpoint
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.quantization import (
    WoqWeightDtype,
    awq,
    calibrate,
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    gptq,
    prepare,
)

from .baichuan import Baichuan
from .base import OwnConfig
from .glm import Glm
from .qwen import QWen
from .yuan import Yuan

MODELS = {
    "glm1": (Glm, "first"),
    "glm2": (Glm, ""),
    "baichuan7": (Baichuan, ""),
    "baichuan13": (Baichuan, "alibi"),
    "yuan": (Yuan, ""),
    "qwen": (QWen, ""),
}
TOKENS = torch.tensor([[5, 9, 17, 33, 4, 8], [7, 3, 90, 12, 61, 25]])
NATIVE = "glm2", "baichuan7", "baichuan13"  # attention of others holds more, or is of no known convention
LINEARS = {"glm1": 9, "glm2": 9, "baichuan7": 11, "baichuan13": 11, "yuan": 15, "qwen": 11}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return build(name)


def build(name):
    model_class, option = MODELS[name]
    torch.manual_seed(3)
    model = model_class(OwnConfig(option=option)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


def woq(dtype=WoqWeightDtype.INT8, **options):
    return get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, **options)


def decode(model, steps=5, padding=0, tokens=TOKENS):
    """Greedy tokens and the logits that they come from, ``[steps, B, vocabulary]``, by a loop with the own cache."""
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    past, found, logits = None, tokens, []
    with torch.inference_mode():
        for _ in range(steps):
            output = model(found, mask, mask.cumsum(-1)[:, -found.shape[1] :] - 1, past)
            past = output.past_key_values
            assert isinstance(past, tuple)
            logits.append(output.logits[:, -1].float())
            found = logits[-1].argmax(-1, keepdim=True)
            mask = torch.cat((mask, torch.ones_like(found)), dim=1)
    logits = torch.stack(logits)
    return logits.argmax(-1), logits


def dequantized(model, quantized):
    """The float model with the weights of the quantized one."""
    reference = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, WeightOnlyQuantizedLinear):
            reference.get_submodule(name).weight = nn.Parameter(affine.dequantize(module.quantized_weight()))
    return reference


def check_decoding(model, expected, tolerance=1e-4, **options):
    (tokens, logits), (expected_tokens, expected_logits) = decode(model, **options), decode(expected, **options)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", [0, 2])
def test_without_quantization_it_says_the_same(model, padding):
    check_decoding(ipex.llm.optimize(model), model, padding=padding)
    check_decoding(ipex.llm.optimize(model), model, padding=padding, tokens=TOKENS[:, :1].repeat(1, 12))


@pytest.mark.parametrize("padding", [0, 2])
def test_quantized_it_computes_what_its_weights_say(name, model, padding):
    optimized = ipex.llm.optimize(model, quantization_config=woq(WoqWeightDtype.INT4, group_size=32))
    found = [each for each, module in optimized.named_modules() if isinstance(module, WeightOnlyQuantizedLinear)]
    assert found == [each for each, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(found) == LINEARS[name]
    check_decoding(optimized, dequantized(model, optimized), padding=padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_weights_in_low_precision_stay_near_the_float_model(model, dtype):
    optimized = ipex.llm.optimize(model, dtype=dtype, quantization_config=woq())
    logits, expected = decode(optimized, 1)[1], decode(model, 1)[1]
    assert (logits - expected).norm() < 0.1 * expected.norm()
    assert {parameter.dtype for parameter in optimized.parameters()} == {dtype}


def test_several_tokens_after_a_past_are_those_of_one_call(model):
    optimized = ipex.llm.optimize(model, quantization_config=woq())
    if "yuan" in type(model).__name__.lower():
        pytest.skip("a filter takes one token after a past")
    with torch.inference_mode():
        past = optimized(TOKENS[:, :3]).past_key_values
        later = [optimized(TOKENS[:, 3:], past_key_values=past).logits for _ in range(2)]  # a past serves twice
        torch.testing.assert_close(later[0], optimized(TOKENS).logits[:, 3:], rtol=1e-4, atol=1e-4)
        assert torch.equal(*later)


def test_a_single_layer_is_optimized(model):
    calls, layer = [], model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    decode(model, steps=2)
    handle.remove()
    optimized = ipex.llm.optimize(layer, quantization_config=woq())
    assert not any(type(module) is nn.Linear for module in optimized.modules())
    for args, kwargs in calls:
        expected, found = layer(*args, **kwargs)[0], optimized(*args, **kwargs)[0]
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_smoothquant(name, model):
    mapping = get_smooth_quant_qconfig_mapping(alpha=0.5)
    prepared = prepare(model, mapping, example_inputs=(TOKENS,))
    converted = convert(calibrate(prepared, [(TOKENS,)]))
    layers = [each for each, module in converted.named_modules() if isinstance(module, Int8Linear)]
    assert len(layers) == LINEARS[name]
    expected = decode(model, 1)[1]
    for quantized in (converted, ipex.llm.optimize(converted)):
        assert (decode(quantized, 1)[1] - expected).norm() < 0.2 * expected.norm()


def test_weights_of_gptq(name, model, tmp_path):
    gptq(model, [{"input_ids": TOKENS}], group_size=32, nsamples=2, pad_max_length=6, save_dir=tmp_path, lm_head=True)
    optimized = ipex.llm.optimize(model, low_precision_checkpoint=load_low_precision_checkpoint(tmp_path))
    assert sum(isinstance(module, WeightOnlyQuantizedLinear) for module in optimized.modules()) == LINEARS[name]
    check_decoding(optimized, dequantized(model, optimized))


def test_weights_of_awq(name, model):
    mapping = woq(WoqWeightDtype.INT4, group_size=32)
    quantized = awq(model, [{"input_ids": TOKENS}], mapping, nsamples=2, pad_max_length=6)
    assert sum(isinstance(module, WeightOnlyQuantizedLinear) for module in quantized.modules()) == LINEARS[name]
    check_decoding(ipex.llm.optimize(quantized), quantized)


def test_generate_without_transformers_caches(model):
    optimized = ipex.llm.optimize(model, quantization_config=woq())
    options = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(optimized.generate(TOKENS, **options)[:, 6:], decode(optimized)[0].squeeze(-1).t())


def test_saved_loaded_copied_and_pickled(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for each in [each for each in sys.modules if each.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.setattr(OwnConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(type(model), "_auto_class", "AutoModelForCausalLM", raising=False)
    optimized = ipex.llm.optimize(model, quantization_config=woq())
    expected = decode(optimized)
    ipex.llm.save(optimized, tmp_path / "saved")
    with pytest.raises(ValueError, match="code in the directory"):
        ipex.llm.load(tmp_path / "saved")
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    loaded = ipex.llm.load(tmp_path / "saved", trust_remote_code=True)
    for other in (loaded, automatic, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert all(map(torch.equal, decode(other), expected))
        assert list(map(str, parts_of(other))) == list(map(str, parts_of(optimized)))


def test_explain_tells_what_is_native(name, model):
    explanation = ipex.explain(ipex.llm.optimize(model, quantization_config=woq()))
    assert all(row.module == "embedding" or "conv" in row.module for row in explanation.rows if row.reason)
    parts = {part.sort: (len(part.native), len(part.stock)) for part in explanation.stack}
    norms = {"glm1": None, "yuan": (7, 0)}  # torch's own norms are not counted
    assert parts.pop("norms", None) == norms.get(name, (5, 0))
    assert parts == {"attention modules": (2, 0) if name in NATIVE else (0, 2), "MLPs": (2, 0)}


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("name", NATIVE)
def test_no_code_of_an_attention_that_is_native_runs(name, monkeypatch, padding):
    model = build(name)
    expected = decode(model, padding=padding)[0]
    optimized = ipex.llm.optimize(model)
    kinds = {type(module) for each, module in model.named_modules() if each.endswith(("attn", "attention"))}
    for kind in kinds:
        monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    assert kinds
    assert torch.equal(decode(optimized, padding=padding)[0], expected)


def test_older_code_may_never_call_post_init(monkeypatch):
    monkeypatch.setattr(Glm, "ends_its_init", False)
    monkeypatch.setattr(Glm, "_tied_weights_keys", ["head.weight"])
    model = build("glm2")
    assert not hasattr(model, "all_tied_weights_keys")
    optimized = ipex.llm.optimize(model, quantization_config=woq())
    check_decoding(optimized, dequantized(model, optimized))


def test_what_the_own_caches_cannot_be_warns():
    with pytest.warns(UserWarning, match="kv_cache_dtype: the code of Glm keeps caches of its own"):
        ipex.llm.optimize(build("glm2"), kv_cache_dtype=torch.int8)
