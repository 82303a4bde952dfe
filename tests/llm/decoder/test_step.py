"""Fused layers in one native call: which they are, and that they compute what their parts do."""

import copy

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

import ipex_quant as ipex
from ipex_quant.llm.decoder.layer import FusedLayer
from ipex_quant.llm.decoder.model import FusedModel
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from ..conftest import random_model
from .decoder_calls import DecoderCalls
from .test_families import GROUPED, HALF_ROTARY, OLD_NAMES, OPT, SIZES

ONE_CALL = {
    "llama": (transformers.LlamaForCausalLM, GROUPED),
    "llama-bias": (transformers.LlamaForCausalLM, {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "qwen3": (transformers.Qwen3ForCausalLM, {**GROUPED, "head_dim": 32}),
    "mistral-window": (transformers.MistralForCausalLM, {**GROUPED, "sliding_window": 4}),
    "phi3": (transformers.Phi3ForCausalLM, GROUPED),
    "phi": (transformers.PhiForCausalLM, GROUPED),
    "glm": (transformers.GlmForCausalLM, {**GROUPED, "head_dim": 16, "attention_bias": True}),
    "stablelm": (transformers.StableLmForCausalLM, {**GROUPED, "rope_parameters": HALF_ROTARY}),
    "stablelm-parallel": (transformers.StableLmForCausalLM, {**GROUPED, "use_parallel_residual": True}),
    "gpt-j": (transformers.GPTJForCausalLM, {**OLD_NAMES, "rotary_dim": 8}),
    "opt": (transformers.OPTForCausalLM, OPT),
    "falcon-multi-query": (transformers.FalconForCausalLM, SIZES),
}
ONE_CALL |= {  # whose norms add one to their weight
    "gemma": (transformers.GemmaForCausalLM, {**GROUPED, "head_dim": 32}),
    "gemma2": (transformers.Gemma2ForCausalLM, {**GROUPED, "head_dim": 32}),
    "gemma3": (transformers.Gemma3ForCausalLM, {**GROUPED, "head_dim": 32}),
}
SEVERAL_CALLS = {
    "llama-tanh": (transformers.LlamaForCausalLM, {**GROUPED, "hidden_act": "tanh"}),
    "gpt-neox": (transformers.GPTNeoXForCausalLM, SIZES),
    "phi-norms": (transformers.PhiForCausalLM, {**GROUPED, "qk_layernorm": True}),  # norms of heads with a bias
}


def build(name, dtype=torch.float32, kv_cache_dtype=None):
    model = random_model(*(ONE_CALL | SEVERAL_CALLS)[name])
    config = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    )
    model = ipex.llm.optimize(model, dtype=dtype, quantization_config=config, kv_cache_dtype=kv_cache_dtype)
    restore_forwards(model, FusedModel)  # layers are called one by one
    return model


def layers_of(model):
    return [module.forward for module in model.modules() if isinstance(vars(module).get("forward"), FusedLayer)]


def in_parts(model):
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        layer.step = None
    return model


def prompts(batch, length=6):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def generate(model, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True} | options
    return model.generate(return_dict_in_generate=True, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ONE_CALL)
def test_generates_with_the_bits_of_its_parts(name, batch):
    model = build(name)
    parts = in_parts(model)
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[0, : 2 if batch > 1 else 0] = 0

    with DecoderCalls() as calls:
        got = generate(model, inputs=prompts(batch), attention_mask=mask)
    expected = generate(parts, inputs=prompts(batch), attention_mask=mask)

    assert calls.layers == [1] * 7 * len(layers_of(model)), "every layer of every step but the prompt's"
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


class Comparisons(TorchFunctionMode):
    """Counts how often a tensor is asked whether it equals None, as lists ask that look for it."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.__eq__ and args[1] is None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama-bias", "phi", "opt"])
def test_compares_no_tensor_with_none(name):
    model = build(name)
    with Comparisons() as comparisons:
        assert [torch.zeros(2)].count(None) == 0
        assert comparisons.count == 1
        generate(model, inputs=prompts(1))
    assert comparisons.count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_cache_dtype", [None, torch.int8])
def test_in_other_dtypes(dtype, kv_cache_dtype):
    model = build("llama", dtype, kv_cache_dtype)
    got, expected = (generate(each, inputs=prompts(2)) for each in (model, in_parts(model)))
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize("name", SEVERAL_CALLS)
def test_other_layers_are_called_in_parts(name):
    layers = layers_of(build(name))
    assert len(layers) == 2
    assert all(layer.step is None for layer in layers)


def test_hooked_modules_are_called():
    model = build("llama")
    seen = []
    restore_forwards(model)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    ipex.llm.native.use_native_stack(model)
    restore_forwards(model, FusedModel)

    generate(model, inputs=prompts(1))

    assert [layer.step is None for layer in layers_of(model)] == [True, False]
    assert len(seen) == 8


def test_beams_and_long_prompts_take_the_ordinary_path():
    model = build("llama")
    with DecoderCalls() as calls:
        got, expected = (generate(each, inputs=prompts(1), num_beams=3) for each in (model, in_parts(model)))
    assert torch.equal(got.sequences, expected.sequences)
    assert not calls.layers


def test_assisted_decoding_has_several_tokens_a_call():
    model = build("llama")
    text = prompts(1).repeat(1, 3)
    with DecoderCalls() as calls:
        got, expected = (generate(each, inputs=text, prompt_lookup_num_tokens=3) for each in (model, in_parts(model)))
    assert torch.equal(got.sequences, expected.sequences)
    assert calls.layers


def test_loaded_weights_count():
    model, other = build("llama"), build("llama")
    for module in other.modules():
        if getattr(module, "_packed", None) is not None:
            module._packed = module._packed.clone()
            module._packed[-64:] = 0x11
    model.load_state_dict(other.state_dict())
    got, expected = (generate(each, inputs=prompts(1)) for each in (model, in_parts(other)))
    assert all(map(torch.equal, got.logits, expected.logits))
