"""W8A8 layers in one native call: which they are, and that they compute what their parts do."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

import ipex_quant as ipex
from ipex_quant import ops
from ipex_quant.llm.decoder import step
from ipex_quant.llm.decoder.model import FusedModel
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.numerics.int8 import StaticActivation
from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.ops.decoder import decoder_layers
from ipex_quant.quantization import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    default_dynamic_qconfig_mapping,
    default_static_qconfig_mapping,
    get_smooth_quant_qconfig_mapping,
)

from ..conftest import inputs_of, random_model
from .decoder_calls import DecoderCalls
from .test_families_compile import compiled_copy, native_calls
from .test_model import MODELS
from .test_step import ONE_CALL, generate, in_parts, layers_of, prompts

MAPPINGS = {
    "smooth": get_smooth_quant_qconfig_mapping,
    "static": lambda: default_static_qconfig_mapping,
    "dynamic": lambda: default_dynamic_qconfig_mapping,
}

INT4 = WeightScheme(WoqWeightDtype.INT4, False, 32)


@pytest.fixture
def build(tmp_path):
    def build(name="llama", kind="smooth", dtype=torch.float32, **options):
        model, mapping = random_model(*(MODELS | ONE_CALL)[name]), MAPPINGS[kind]()
        if kind != "dynamic":
            lowered = ipex.llm.optimize(model, quantization_config=mapping)
            prepared = ipex.quantization.prepare(lowered, mapping, example_kwarg_inputs=inputs_of(model))
            prepared(**inputs_of(model))
            prepared.save_qconf_summary(qconf_summary=tmp_path / "q.json")
            options["qconfig_summary_file"] = tmp_path / "q.json"
        return ipex.llm.optimize(model, dtype=dtype, quantization_config=mapping, **options)

    return build


def one_by_one(model):
    restore_forwards(model, FusedModel)
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["smooth", "dynamic"])
@pytest.mark.parametrize("name", ONE_CALL)
def test_generates_with_the_bits_of_its_parts(build, name, kind, batch):
    model = one_by_one(build(name, kind))
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[0, : 2 if batch > 1 else 0] = 0

    with DecoderCalls() as calls:
        got = generate(model, inputs=prompts(batch), attention_mask=mask)
    expected = generate(in_parts(model), inputs=prompts(batch), attention_mask=mask)

    assert calls.layers == [1] * 7 * len(layers_of(model)), "every layer of every step but the prompt's"
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "olmo"])
def test_all_layers_are_one_call(build, name, kind):
    model = build(name, kind)
    with DecoderCalls() as calls:
        got = generate(model, inputs=prompts(1))
    assert calls.layers == [2] * 7
    expected = generate(one_by_one(in_parts(model)), inputs=prompts(1))
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [None, torch.int8])
@pytest.mark.parametrize("kind", ["smooth", "dynamic"])
def test_in_other_dtypes(build, kind, dtype, cache):
    model = build("llama-bias", kind, dtype, kv_cache_dtype=cache)
    got, expected = (generate(each, inputs=prompts(3)) for each in (model, one_by_one(in_parts(model))))
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize("kind", MAPPINGS)
def test_continuous_batches_are_one_call_a_step(build, kind, monkeypatch):
    model, calls = build("llama", kind), []

    def counted(x, weights, call, structure):  # by a thread of the engine, which no dispatch mode sees
        calls.append((len(call.starts), len(call.pages)))
        return decoder_layers(x, weights, call, structure)

    monkeypatch.setattr(step, "decoder_layers", counted)
    inputs = [prompts(1, length)[0].tolist() for length in (4, 7, 5)]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    results = model.generate_batch(inputs, options, ContinuousBatchingConfig(num_blocks=40, page_size=8))
    assert set(calls) == {(2, 3)}
    alone = [model.generate(torch.tensor([tokens]), generation_config=options)[0, len(tokens) :] for tokens in inputs]
    assert [result.generated_tokens for result in results.values()] == [tokens.tolist() for tokens in alone]


def separate(model):
    """`model` with every linear of a share group of its own, whose static inputs differ."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            own = module.activation
            if own is not None:
                own = StaticActivation(own.scale * (1 + 0.01 * module.member), own.zero_point, own.smoothing_factor)
            model.set_submodule(
                name, *Int8Linear.make_group([module.quantized_weight()], [module.bias], own, torch.float32)
            )
    ipex.llm.native.use_native_stack(model)
    return model


@pytest.mark.parametrize("kind", MAPPINGS)
def test_weights_of_one_input_that_share_nothing(build, kind):
    model = separate(build("llama-bias", kind))
    with DecoderCalls() as calls:
        got = generate(model, inputs=prompts(1))
    assert calls.layers == [2] * 7
    expected = generate(one_by_one(in_parts(model)), inputs=prompts(1))
    assert all(map(torch.equal, got.logits, expected.logits))


def test_loaded_weights_and_activations_count(build):
    model = build("llama")
    other = copy.deepcopy(model)
    with DecoderCalls() as calls:
        first = generate(model, inputs=prompts(1))
        state = other.state_dict()
        for name, tensor in state.items():
            if name.endswith("k_proj.input_scale"):
                tensor.mul_(1.5)
            if name.endswith("down_proj.codes"):
                tensor.neg_()
        for each in (model, other):
            each.load_state_dict(state)
        calls.layers.clear()
        got = generate(model, inputs=prompts(1))
        assert calls.layers == [2] * 7
    assert not model.model.layers[0].self_attn.q_proj.share_group.has_one_input()
    expected = generate(one_by_one(in_parts(other)), inputs=prompts(1))
    assert all(map(torch.equal, got.logits, expected.logits))
    assert not torch.equal(got.logits[1], first.logits[1])


@pytest.mark.parametrize("kind", ["smooth", "dynamic"])
def test_weight_only_linears_among_them(build, kind):
    """Those of another input are in the call; of one input, some keep the layer's parts."""
    model, place = build("llama", kind), "self_attn.o_proj"
    for name, count in ((place, 7), ("self_attn.k_proj", 0)):
        for layer in model.model.layers:
            old = layer.get_submodule(name)
            layer.set_submodule(name, weight_only(old))
        ipex.llm.native.use_native_stack(model)
        with DecoderCalls() as calls:
            got = generate(model, inputs=prompts(1))
        assert calls.layers == [2] * count
        expected = generate(one_by_one(in_parts(model)), inputs=prompts(1))
        assert all(map(torch.equal, got.logits, expected.logits))


def weight_only(module):
    weight = ops.quantize_weight(module.dequantized_weight(torch.float32), INT4)
    return WeightOnlyQuantizedLinear.from_quantized_weight(weight, None, WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH)


def as_float(module):
    linear = nn.Linear(module.in_features, module.out_features, bias=False)
    linear.weight.data.copy_(module.dequantized_weight(torch.float32))
    return linear


@pytest.mark.parametrize("left_out", [nn.Linear, "hook"])
def test_layers_with_other_linears_are_called_in_parts(build, left_out):
    model, seen = build("llama", "dynamic"), []
    layer = model.model.layers[1]
    if left_out == "hook":
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    else:
        layer.mlp.set_submodule("down_proj", as_float(layer.mlp.down_proj))
    ipex.llm.native.use_native_stack(model)
    with DecoderCalls() as calls:
        generate(model, inputs=prompts(1))
    assert calls.layers == [1] * 7
    assert len(seen) == (8 if left_out == "hook" else 0)
    assert [each.step is None for each in layers_of(model)] == [False, True]


@pytest.mark.parametrize("kind", MAPPINGS)
def test_compiled_steps_are_one_call(build, kind):
    torch.compiler.reset()
    counter, model = CompileCounterWithBackend("aot_eager"), build("llama", kind)
    options = {"inputs": prompts(2), "attention_mask": torch.tensor([[1] * 6, [0] * 2 + [1] * 4])}
    expected = generate(model, **options)
    got = generate(compiled_copy(model, counter), **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    assert [native_calls(graph) for graph in counter.graphs] == [0, 1]
