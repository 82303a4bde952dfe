"""All layers of a model in one native call: when they are, and that nobody can tell from the results."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.llm.cache.layers import NativeLayer
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.decoder.attention import alibi_slopes
from ipex_quant.llm.decoder.families import Rope
from ipex_quant.llm.decoder.model import Angles, FusedModel
from ipex_quant.llm.decoder.step import LayerStep
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from ..conftest import random_model
from .decoder_calls import DecoderCalls
from .interleaving import codes_of, interleavings
from .test_families import GROUPED

MODELS = {
    "llama": (transformers.LlamaForCausalLM, GROUPED),
    "mistral": (transformers.MistralForCausalLM, {**GROUPED, "sliding_window": None}),
    "qwen2": (transformers.Qwen2ForCausalLM, GROUPED),
    "qwen3": (transformers.Qwen3ForCausalLM, {**GROUPED, "head_dim": 32}),
    "phi3": (transformers.Phi3ForCausalLM, GROUPED),
    "glm": (transformers.GlmForCausalLM, {**GROUPED, "head_dim": 16, "attention_bias": True}),
    "olmo": (transformers.OlmoForCausalLM, GROUPED),
    "cohere": (transformers.CohereForCausalLM, GROUPED),
    "smollm3": (transformers.SmolLM3ForCausalLM, {**GROUPED, "no_rope_layers": [1, 1], "pad_token_id": 0}),
}


@pytest.fixture
def calls():
    """Layers of every native call."""
    with DecoderCalls() as calls:
        yield calls.layers


def build(name="llama"):
    model = random_model(*MODELS[name])
    config = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    )
    return ipex.llm.optimize(model, quantization_config=config, inplace=True)


def one_by_one(model):
    model = copy.deepcopy(model)
    restore_forwards(model, FusedModel)
    return model


def generate(model, **options):
    prompt = torch.randint(3, 96, (options.pop("batch", 1), 6), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True} | options
    return model.generate(prompt, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_generates_with_the_bits_of_the_layers(name, batch, calls):
    model = build(name)
    expected = generate(one_by_one(model), batch=batch)
    native = len(calls)
    calls.clear()

    got = generate(model, batch=batch)

    assert calls == ([2] * 5 if native else [])
    assert native or name == "olmo", "all but OLMo, whose norms have no weight"
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


def other_rope(layer):
    layer.attention.names = dataclasses.replace(layer.attention.names, rope=Rope.NONE)
    return layer


def own_table(layer):
    layer.attention.names = dataclasses.replace(layer.attention.names, rope=Rope.TABLE)
    return layer


def other_slopes(layer):
    layer.attention.slopes = alibi_slopes(layer.attention.heads)
    return layer


def other_eps(layer):
    return layer._replace(structure=dataclasses.replace(layer.structure, eps=0.1))


@pytest.mark.parametrize("change", [other_rope, other_slopes, other_eps])
def test_layers_that_differ_are_not_joined(change):
    first, second = (layer.forward.step for layer in build().model.layers)
    assert len(LayerStep.joined([first, second]).layers) == 2
    assert LayerStep.joined([first, LayerStep([change(second.layers[0])])]) is None


def test_layers_with_tables_of_their_own_are_not_joined():
    layers = [LayerStep([own_table(layer.forward.step.layers[0])]) for layer in build().model.layers]
    assert LayerStep.joined(layers[:1])
    assert LayerStep.joined(layers) is None


def test_a_model_of_rotated_and_other_layers_calls_each(calls, monkeypatch):
    monkeypatch.setitem(MODELS, "mixed", (MODELS["smollm3"][0], {**MODELS["smollm3"][1], "no_rope_layers": [1, 0]}))
    model = build("mixed")
    expected = generate(one_by_one(model))
    calls.clear()
    got = generate(model)
    assert calls == [1] * 10
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_positions_beyond_the_first_ones(rope, calls, monkeypatch):
    options = {**GROUPED, "rope_parameters": {"rope_theta": 10000.0, **rope}, "max_position_embeddings": 64}
    monkeypatch.setitem(MODELS, "rope", (transformers.LlamaForCausalLM, options))
    model = build("rope")
    expected = generate(one_by_one(model), max_new_tokens=130, min_new_tokens=130)
    calls.clear()
    got = generate(model, max_new_tokens=130, min_new_tokens=130)
    assert set(calls) == {2}
    assert all(map(torch.equal, got.logits, expected.logits))


def test_given_positions_count(calls):
    model = build()
    tokens = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for each in (model, one_by_one(model)):
        cache = each(tokens[:, :6], use_cache=True)[CACHE]
        results.append(each(tokens[:, 6:], **{CACHE: cache}, position_ids=torch.tensor([[9]])).logits)
    assert 2 in calls
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"num_beams": 2},
        {"use_cache": False},
    ],
)
def test_what_needs_the_layers_calls_them(options, calls):
    model = build()
    expected = generate(one_by_one(model), **options)
    calls.clear()
    got = generate(model, **options)
    assert 2 not in calls
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        assert all(map(torch.equal, a, b))


def test_padded_sequences_are_computed_together(calls):
    """Their first tokens layer by layer, the later ones, one of each, in one call."""
    model = build()
    options = {"batch": 3, "attention_mask": torch.ones(3, 6).long()}
    options["attention_mask"][0, :2] = options["attention_mask"][2, :5] = 0
    expected = generate(one_by_one(model), **options)
    calls.clear()
    got = generate(model, **options)
    assert calls == [2] * 5
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


def test_hooks_on_layers_are_called(calls):
    model, seen = build(), []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    generate(model)
    assert len(seen) == 6
    assert 2 not in calls
    handle.remove()
    generate(model)
    assert 2 in calls


def test_hidden_states_asked_once_do_not_matter_afterwards(calls):
    model = build()
    expected = generate(model)
    generate(model, output_hidden_states=True)
    calls.clear()
    got = generate(model)
    assert calls == [2] * 5
    assert all(map(torch.equal, got.logits, expected.logits))


def test_replaced_and_restored_layers_count(calls):
    model = build()
    expected = generate(model)
    restore_forwards(model.model.layers[0])
    calls.clear()
    got = generate(model)
    assert 2 not in calls
    torch.testing.assert_close(got.logits, expected.logits)
    ipex.llm.native.use_native_stack(model)
    calls.clear()
    assert torch.equal(generate(model).sequences, expected.sequences)
    assert 2 in calls


def test_the_base_model_alone(calls):
    model = build().model
    tokens = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(1))
    whole = model(tokens).last_hidden_state
    cache = transformers.DynamicCache(config=model.config)
    cache.layers = [NativeLayer() for _ in cache.layers]
    model(tokens[:, :6], **{CACHE: cache})
    calls.clear()
    second = model(inputs_embeds=model.embed_tokens(tokens[:, 6:]), **{CACHE: cache})
    assert calls == [2]
    assert second[CACHE] is cache
    torch.testing.assert_close(second.last_hidden_state, whole[:, 6:], rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="input_ids"):
        model(**{CACHE: cache})
    assert isinstance(model(tokens[:, :1], **{CACHE: cache}, return_dict=False), tuple)


def test_copies_and_pickles_work(calls):
    model = build()
    with torch.inference_mode():
        expected = generate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        got = generate(other)
        assert calls == [2] * 5
        assert all(map(torch.equal, got.logits, expected.logits))
        assert other.model.forward.plan.layers[0].module is other.model.layers[0]


def test_tables_of_angles_are_not_those_of_another_call():
    angles, x = build().model.forward.angles, torch.zeros(1, 1, 64)
    calls = [lambda start=start: angles.of_run(x, start, 1) for start in (3, 3 + 3 * angles.BLOCK)]
    expected = [[each.clone() for each in call()] for call in calls]
    right = [
        all(map(torch.equal, got[0] + got[1], expected[0] + expected[1]))
        for got in interleavings(lambda: calls, codes_of(Angles))
    ]
    assert len(right) > 20
    assert all(right)


def test_first_calls_at_once():
    model = build()
    tokens = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(1))

    def logits(model):
        cache = model(tokens[:, :6], use_cache=True)[CACHE]
        return model(tokens[:, 6:], **{CACHE: cache}).logits

    def two_calls_of_a_fresh_model():
        fresh = copy.deepcopy(model)
        return [lambda: logits(fresh)] * 2

    expected = logits(copy.deepcopy(model))
    got = [*interleavings(two_calls_of_a_fresh_model, codes_of(LayerStep, FusedModel), "line")]
    assert len(got) > 50
    assert all(torch.equal(each, expected) for both in got for each in both)
