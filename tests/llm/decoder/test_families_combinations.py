"""Every source of quantized weights through the whole native stack, against floats, with no weight dequantized."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache

import ipex_quant as ipex
from ipex_quant.checkpoints import gptq_tensors
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.native import use_native_stack
from ipex_quant.nn import Int8Linear, QuantizedModule
from ipex_quant.nn.fused_forward import FusedForward, fused_forward, restore_forwards
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.quantization import (
    WoqLowpMode,
    WoqWeightDtype,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)

from ..test_static_flow import relative_error, simulated
from . import test_families, test_families_encoders

ENCODERS = ["t5", "whisper"]
MODELS = ["llama", "qwen2", "gpt-j", "phi", "opt", *ENCODERS]
STATIC = {"static": ipex.quantization.default_static_qconfig_mapping, "smooth": get_smooth_quant_qconfig_mapping()}
SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 32)


def build(name):
    return (test_families_encoders if name in ENCODERS else test_families).build(name)


def inputs_of(name):
    """Arguments of a forward pass."""
    if name in ENCODERS:
        tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(2))
        return {**test_families_encoders.inputs(name), "decoder_input_ids": tokens}
    tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits(model, name):
    """Logits of a prompt, of two more tokens in one step and of one, and what a whole pass gives."""
    whole = model(**inputs_of(name), use_cache=False).logits
    steps = test_families_encoders.steps(model, name) if name in ENCODERS else test_families.steps(model, 3)
    return torch.cat([whole.flatten(), steps.flatten()])


def weight_only(dtype, **options):
    def quantized(model, name):
        mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, group_size=32, **options)
        model = ipex.llm.optimize(model, quantization_config=mapping)
        restore_forwards(model)
        reference = copy.deepcopy(model)
        for path, module in list(reference.named_modules()):
            if isinstance(module, QuantizedModule):
                _put(reference, path, affine.dequantize(module.quantized_weight()), module.bias)
        return model, reference

    return quantized


def from_checkpoint(act_order):
    def quantized(model, name):
        reference, state = copy.deepcopy(model), dict(model.state_dict())
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head" and "proj_out" not in path:
                weight = affine.quantize(state.pop(f"{path}.weight") * 0.5, SCHEME)
                changes = {"scales": weight.scales.half().float()}  # as the format has them
                if act_order:  # the same for all that share an input
                    order = torch.randperm(module.in_features, generator=torch.Generator().manual_seed(3))
                    changes["g_idx"] = order.int() // 32
                weight = replace(weight, **changes)
                state |= {f"{path}.{key}": value for key, value in gptq_tensors(weight, v2=False).items()}
                _put(reference, path, affine.dequantize(weight), module.bias)
        config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": act_order}
        mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
        return ipex.llm.optimize(
            model, quantization_config=mapping, low_precision_checkpoint=(state, config)
        ), reference

    return quantized


def _put(model, path, weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    model.set_submodule(path, linear)


WEIGHT_ONLY = {
    "int8": weight_only(WoqWeightDtype.INT8),
    "int4": weight_only(WoqWeightDtype.INT4),
    "nf4": weight_only(WoqWeightDtype.NF4),
    "fp8": weight_only(WoqWeightDtype.FP8),
    "gptq": from_checkpoint(act_order=False),
    "gptq-act-order": from_checkpoint(act_order=True),
}


def calibrated(model, name, mapping):
    """What prepare, calibration and convert make of it."""
    inputs = inputs_of(name)
    prepared = ipex.quantization.prepare(model, mapping, example_kwarg_inputs=inputs)
    for shift in range(3):
        prepared(**{key: (value + shift) % 96 if "ids" in key else value for key, value in inputs.items()})
    return ipex.quantization.convert(prepared)


class NothingDequantized(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "dequantize" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def run_packed(monkeypatch):
    """``run_packed(model, name)``: `logits` of the native stack, in which no weight may be dequantized."""

    def refuse(*args, **options):
        raise AssertionError("a weight is dequantized")

    def run(model, name):
        restore_forwards(model)
        with monkeypatch.context() as patch, NothingDequantized():
            patch.setattr(affine, "dequantize", refuse)
            for kind in QuantizedModule.__subclasses__():
                patch.setattr(kind, "dequantized_weight", refuse)
            use_native_stack(model)
            assert sum(isinstance(fused_forward(module), FusedForward) for module in model.modules()) >= 2
            return logits(model, name)

    return run


@pytest.mark.filterwarnings("ignore:most weights stay in float:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", WEIGHT_ONLY)
def test_packed_weights_compute_what_their_floats_do(name, source, run_packed):
    model, reference = WEIGHT_ONLY[source](build(name), name)
    expected = logits(reference, name)

    torch.testing.assert_close(run_packed(model, name), expected, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:most weights stay in float:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", STATIC)
def test_static_int8_computes_what_its_simulation_does(name, kind, run_packed, tmp_path):
    converted = calibrated(build(name), name, STATIC[kind])
    expected = logits(simulated(converted), name)

    assert any(type(module) is Int8Linear for module in converted.modules())
    assert relative_error(run_packed(converted, name), expected) < 0.02


@pytest.mark.filterwarnings("ignore:most weights stay in float:UserWarning")
@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_a_bfloat16_stack_multiplies_in_int8_and_caches_in_int8(name):
    model = build(name)
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    )
    expected = logits(ipex.llm.optimize(model, quantization_config=mapping), name)
    lean = ipex.llm.optimize(model, dtype=torch.bfloat16, quantization_config=mapping, kv_cache_dtype=torch.int8)
    given = inputs_of(name)
    cache = DynamicCache()
    caches = EncoderDecoderCache(cache, DynamicCache()) if name == "t5" else cache

    result = lean(**given, **{CACHE: caches}, use_cache=True).logits

    assert cache.layers[0]._buffers[0].dtype == torch.int8
    assert relative_error(result.flatten(), expected[: result.numel()]) < 0.15


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_nan_stays_in_its_sequence(name):
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    )
    model = ipex.llm.optimize(build(name), quantization_config=mapping, kv_cache_dtype=torch.int8)
    embeddings = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))

    def steps():
        cache = DynamicCache()
        parts = (embeddings[:, :8], embeddings[:, 8:])
        return torch.cat([model(inputs_embeds=part, **{CACHE: cache}).logits for part in parts], dim=1)

    expected = steps()
    embeddings[1, 3] = torch.nan
    actual = steps()

    assert torch.equal(actual[0], expected[0])
    assert actual[1, 3:].isnan().all()
