import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation import ContinuousBatchingConfig
from transformers.modeling_outputs import BaseModelOutput

import ipex_quant as ipex
from ipex_quant.llm.attention import use_native_attention
from ipex_quant.llm.cache.layers import NativeLayer, SlidingLayer
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.decoder.layer import FusedLayer
from ipex_quant.llm.generation import CacheHook, use_native_cache
from ipex_quant.nn.fused_forward import fused_forward

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    **TOKENS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, GROUPED),
    "mistral": (transformers.MistralForCausalLM, {**GROUPED, "sliding_window": 8}),
    "qwen2": (transformers.Qwen2ForCausalLM, GROUPED),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, SIZES),
    "opt": (transformers.OPTForCausalLM, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        {**GROUPED, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    ),
    "gptj": (
        transformers.GPTJForCausalLM,
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256, **TOKENS},
    ),
    "bloom": (
        transformers.BloomForCausalLM,
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        {
            **{"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            **{"decoder_start_token_id": 0, **TOKENS},
        },
    ),
    "whisper": (
        transformers.WhisperForConditionalGeneration,
        {
            **{"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_mel_bins": 8},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48},
            **{"decoder_ffn_dim": 48, "max_source_positions": 20, "max_target_positions": 64},
            **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None, **TOKENS},
        },
    ),
    "qwen3_next": (
        transformers.Qwen3NextForCausalLM,
        {
            **{**GROUPED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "num_experts": 0, "decoder_sparse_step": 5},
        },
    ),
}
"""Small models; two have sliding windows, two an attention of their own, two an encoder, one linear attention."""


def build(name, seed=0):
    torch.manual_seed(seed)
    model_class, options = MODELS[name]
    model = model_class(model_class.config_class(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def native(model, kv_cache_dtype=None):
    model = copy.deepcopy(model)
    use_native_attention(model)
    use_native_cache(model, kv_cache_dtype)
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model as transformers has it, and the same one with native attention and caches."""
    model = build(request.param)
    return model, native(model)


@pytest.fixture(scope="module")
def llama_pair():
    model = build("llama")
    return model, native(model)


def prompt(model, batch=2, length=13, pad=0):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    tokens = torch.randint(3, 97, (batch, length), generator=generator)
    tokens[0, :pad] = 0
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def generate(model, inputs, **options):
    torch.manual_seed(1)
    return model.generate(**inputs, **{"max_new_tokens": 14, **options})


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "returned": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "chunked": {"prefill_chunk_size": 5},
    "chunked_beams": {"prefill_chunk_size": 5, "num_beams": 3},
}


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_transformers(pair, mode, pad):
    model, other = pair
    if "chunked" in mode and model.config.is_encoder_decoder:
        pytest.skip("transformers cuts the prompts of decoders alone")
    inputs = prompt(model, pad=pad)
    want, got = (generate(x, inputs, **MODES[mode]) for x in (model, other))
    assert want.shape[1] > 5
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_assisted_decoding(pair, options):
    model, other = pair
    name = next(name for name, (kind, _) in MODELS.items() if type(model) is kind)
    if name in ("whisper", "t5") and "assistant_model" not in options:
        pytest.skip("transformers looks prompts up for decoders alone")
    if name == "qwen3_next":
        pytest.skip("what transformers cannot take back")
    inputs = prompt(model, batch=1)
    outputs = []
    for x in (model, other):
        if "assistant_model" in options:
            assistant = build(name, seed=1)
            options = {"assistant_model": native(assistant) if x is other else assistant}
        outputs.append(generate(x, inputs, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("beams", [1, 3])
def test_continued_chat(pair, beams):
    model, other = pair
    if model.config.is_encoder_decoder:
        pytest.skip("has no chat to go on with")
    outputs = []
    for x in (model, other):
        inputs = prompt(x)
        first = generate(x, inputs, num_beams=beams, num_return_sequences=beams, return_dict_in_generate=True)
        if beams > 1:
            outputs.append(first.sequences)
            continue
        more = torch.full((2, 4), 7)
        tokens = torch.cat([first.sequences, more], dim=1)
        second = generate(x, {"input_ids": tokens}, **{CACHE: first[CACHE]})
        outputs.append(second)
        assert second.shape[1] > tokens.shape[1]
    assert torch.equal(*outputs)


def native_layers(cache):
    layers = getattr(cache, "layers", [])
    if isinstance(cache, EncoderDecoderCache):
        layers = cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    return [layer for layer in layers if isinstance(layer, NativeLayer)]


def cache_of(model, inputs, **options):
    caches = []
    handle = model.register_forward_hook(lambda module, args, out: caches.append(out[CACHE]))
    generate(model, inputs, **options)
    handle.remove()
    return caches[-1]


def test_layers_are_replaced(pair):
    _, model = pair
    layers = native_layers(cache_of(model, prompt(model)))
    expected = {"t5": 4, "whisper": 4, "qwen3_next": 1}
    name = next(name for name, (kind, _) in MODELS.items() if type(model) is kind)
    assert len(layers) == expected.get(name, 2)
    sliding = {"mistral": 2, "gemma2": 1}.get(name, 0)
    assert sum(isinstance(layer, SlidingLayer) for layer in layers) == sliding


def test_prompts_are_computed_and_stored_once_for_their_beams(llama_pair):
    _, model = llama_pair
    batches = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: batches.append(args[0].shape[:2]))
    cache = cache_of(model, prompt(model, length=40), num_beams=4)
    handle.remove()
    assert batches[0] == (2, 40)
    assert set(batches[1:]) == {(8, 1)}
    for layer in native_layers(cache):
        assert layer._used == 2 * 40 + 8 * (len(batches) - 1)


def test_several_returned_sequences_share_their_prompt(llama_pair):
    _, model = llama_pair
    cache = cache_of(model, prompt(model, length=40), num_return_sequences=3, do_sample=True)
    steps = cache.get_seq_length() - 40
    assert [layer._used for layer in native_layers(cache)] == [2 * 40 + 6 * steps] * 2


def test_a_prompt_may_be_computed_without_the_cache_it_came_with():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 8  # from there on the cache is made anew
    config = transformers.Phi3Config(**GROUPED, rope_parameters=rope, original_max_position_embeddings=8)
    model = transformers.Phi3ForCausalLM(config).eval()
    for length in (5, 13):
        expected, actual = (generate(each, prompt(model, 2, length), num_beams=3) for each in (model, native(model)))
        assert torch.equal(actual, expected)


def test_several_sequences_in_a_row():
    torch.manual_seed(0)
    config = transformers.MoshiConfig(**GROUPED, ffn_dim=64)  # which looks for them if it gets no cache
    model = transformers.MoshiForCausalLM(config).eval()
    inputs = {"input_ids": prompt(model, 1, 6)["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    expected = model(**inputs).logits
    torch.testing.assert_close(native(model)(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(inputs["input_ids"]).logits, expected)


def test_what_was_encoded_is_seen_through_no_window():
    torch.manual_seed(0)
    side = {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(encoder=side, decoder={**side, "cross_attention_hidden_size": 32}, **TOKENS)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    other = native(model)

    def logits(model):
        tokens = prompt(model, 1, 12)["input_ids"]
        first = model(tokens, decoder_input_ids=tokens[:, :1])
        encoded = BaseModelOutput(first.encoder_last_hidden_state)
        past = {"encoder_outputs": encoded, CACHE: first[CACHE]}
        return model(decoder_input_ids=tokens[:, 1:2], **past).logits

    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_encoder_states_are_stored_once_for_their_beams():
    model = native(build("t5"))
    cache = cache_of(model, prompt(model, length=40), num_beams=4)
    for layer in native_layers(cache.cross_attention_cache):
        assert layer._used == 2 * 40
        assert layer._capacity == 2 * 40
        assert layer.keys.shape[0] == 8


def test_hidden_states_and_scores_come_for_every_sequence(llama_pair):
    model, other = llama_pair
    options = {
        "num_beams": 3,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "output_scores": True,
        "output_logits": True,
    }
    want, got = (generate(x, prompt(x), **options) for x in (model, other))
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-3, atol=1e-3)


def logits_of(model, tokens, steps=8):
    """Logits of a prefill and of decoding steps."""
    cache = DynamicCache(config=model.config)
    out = [model(tokens[:, :-steps], **{CACHE: cache}).logits[:, -1]]
    out += [model(column, **{CACHE: cache}).logits[:, -1] for column in tokens[:, -steps:].split(1, dim=1)]
    return torch.stack(out, 1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gptj"])
@pytest.mark.parametrize("by_config", [False, True])
def test_int8_is_close_to_float(name, by_config):
    model = build(name)
    other = native(model, None if by_config else torch.int8)
    if by_config:
        other.config.kv_cache_dtype = torch.int8
    tokens = prompt(model, length=30)["input_ids"]
    want, got = logits_of(model, tokens), logits_of(other, tokens)
    assert (got - want).norm() < 0.05 * want.norm()
    assert not torch.equal(got, want)
    cache = cache_of(other, prompt(model, length=30), num_beams=3)
    assert {layer._buffers[0].dtype for layer in native_layers(cache)} == {torch.int8}


def test_float_cache_of_another_dtype():
    model = build("llama")
    other = native(model, torch.bfloat16)
    tokens = prompt(model, length=30)["input_ids"]
    want, got = logits_of(model, tokens), logits_of(other, tokens)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_nan_in_one_sequence_stays_there(dtype):
    model = native(build("llama"), dtype)
    cache = DynamicCache(config=model.config)
    embedded = model.model.embed_tokens(prompt(model)["input_ids"])
    clean = model(inputs_embeds=embedded, **{CACHE: DynamicCache(config=model.config)}).logits
    embedded[0, 3] = torch.nan
    out = model(inputs_embeds=embedded, **{CACHE: cache}).logits
    assert out[0, 3:].isnan().all()
    assert torch.equal(out[1], clean[1])
    step = model(torch.tensor([[5], [6]]), **{CACHE: cache}).logits
    assert step[0].isnan().all()
    assert step[1].isfinite().all()


def test_forward_makes_native_caches_itself(llama_pair):
    model, other = llama_pair
    tokens = prompt(model)["input_ids"]
    want, got = model(tokens), other(tokens)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert len(native_layers(got[CACHE])) == 2
    assert getattr(other(tokens, use_cache=False), CACHE) is None
    with torch.enable_grad():
        out = other(tokens)
        assert not native_layers(out[CACHE])
        assert out.logits.requires_grad


@pytest.mark.parametrize("hidden", [False, True], ids=["argument", "inside"])
def test_gradients_reach_a_soft_prompt(llama_pair, hidden):
    grads = []
    for model in llama_pair:
        model.requires_grad_(False)
        tokens = prompt(model)["input_ids"]
        embedding = model.get_input_embeddings()
        soft = embedding(tokens).clone().requires_grad_()
        with torch.enable_grad():
            if hidden:
                handle = embedding.register_forward_hook(lambda *_, soft=soft: soft)
                model(tokens).logits.square().sum().backward()
                handle.remove()
            else:
                model(inputs_embeds=soft).logits.square().sum().backward()
        grads.append(soft.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


def test_caches_that_hold_something_stay_as_they_are(llama_pair):
    model, other = llama_pair
    tokens = prompt(model)["input_ids"]
    cache = model(tokens)[CACHE]
    assert not native_layers(other(tokens[:, :1], **{CACHE: cache})[CACHE])


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_other_cache_implementations(llama_pair, implementation):
    want, got = (
        generate(x, prompt(x, pad=3), cache_implementation=implementation, disable_compile=True, num_beams=2)
        for x in llama_pair
    )
    assert torch.equal(got, want)


def test_an_offloaded_cache_that_keeps_another_dtype_than_asked_for_warns(llama_pair):
    _, other = llama_pair
    cache = DynamicCache(config=other.config)
    cache.offloading = True  # making one needs a GPU
    with pytest.warns(UserWarning, match="an offloaded cache keeps keys and values in the model's"):
        CacheHook(other, torch.int8).make_native(cache, other)
    assert not any(isinstance(layer, NativeLayer) for layer in cache.layers)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_static_cache_that_keeps_another_dtype_than_asked_for_warns(llama_pair, dtype):
    model, other = llama_pair
    use_native_cache(other, dtype)
    options = {"cache_implementation": "static", "disable_compile": True}
    with pytest.warns(UserWarning, match="a static cache keeps keys and values in the model's dtype") as caught:
        got = generate(other, prompt(other), **options)
    assert len(caught) == 1
    assert torch.equal(got, generate(model, prompt(model), **options))


def test_a_model_without_a_cache_warns_of_its_dtype():
    model = transformers.DistilBertModel(transformers.DistilBertConfig(n_layers=1, dim=32, n_heads=2, hidden_dim=32))
    with pytest.warns(UserWarning, match="kv_cache_dtype: a DistilBertModel has no cache of keys and values"):
        use_native_cache(model, torch.int8)


def test_another_attention_is_computed_in_layers_that_were_fused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).eval().requires_grad_(False)
    fused = ipex.llm.optimize(model, dtype=torch.float32)
    inputs = prompt(model)
    native = fused(**inputs, output_attentions=False).logits
    fused.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    assert fused.config._attn_implementation == "eager"
    assert not any(isinstance(fused_forward(module), FusedLayer) for module in fused.modules())
    attentions = fused(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(attentions[0], model(**inputs, output_attentions=True).attentions[0])
    fused.set_attn_implementation("ipex_quant")
    assert sum(isinstance(fused_forward(module), FusedLayer) for module in fused.modules()) == 2
    assert torch.equal(fused(**inputs).logits, native)


def test_without_a_cache(llama_pair):
    want, got = (generate(x, prompt(x, pad=3), use_cache=False, num_beams=2) for x in llama_pair)
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_token_latency(llama_pair, options):
    model, other = llama_pair
    inputs = prompt(model, batch=1)
    want = generate(model, inputs, **options)
    other.config.token_latency = True
    try:
        got, seconds = generate(other, inputs, **options)
    finally:
        other.config.token_latency = False
    assert torch.equal(got, want)
    assert len(seconds) == got.shape[1] - 13 or "num_beams" in options
    assert all(second > 0 for second in seconds)


def test_stays_native_when_copied():
    model = native(build("llama"), torch.int8)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.zero_()
    cache = cache_of(other, prompt(other), num_beams=2)
    assert len(native_layers(cache)) == 2
    assert not cache.layers[0].keys.any()  # it is the copy that computes
    use_native_cache(other, torch.float16)
    assert cache_of(other, prompt(other)).layers[0]._buffers[0].dtype == torch.float16
    assert len(other._forward_pre_hooks) == 1


def test_stays_native_when_pickled(tmp_path):
    model = native(build("llama"), torch.int8)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(native_layers(cache_of(loaded, prompt(model), num_beams=2))) == 2
    assert torch.equal(generate(loaded, prompt(model)), generate(model, prompt(model)))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_copies_of_a_prefilled_cache(name):
    model = build(name)
    other = native(model)
    tokens = prompt(model, length=20)["input_ids"]
    outputs = []
    for x in (model, other):
        cache = x(tokens[:, :15], **{CACHE: DynamicCache(config=x.config)})[CACHE]
        for _ in range(2):
            outputs.append(generate(x, {"input_ids": tokens}, **{CACHE: copy.deepcopy(cache)}))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_is_saved_like_any_model(tmp_path):
    model = native(build("llama"))
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, prompt(model)), generate(model, prompt(model)))


def test_modules_without_native_attention_are_named():
    assert use_native_cache(build("gptj")) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    model = build("llama")
    assert use_native_cache(model) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    use_native_attention(model)
    assert use_native_cache(model) == []


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="transformers model"):
        use_native_cache(nn.Linear(2, 2))
    model = build("llama")
    with pytest.raises(ValueError, match=r"torch\.int8"):
        use_native_cache(model, torch.float8_e5m2)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("name", "dtype", "beams"), [("mistral", None, 1), ("llama", torch.int8, 3)])
def test_compiles_without_a_graph_break(name, dtype, beams):
    model = native(build(name), dtype)
    tokens = prompt(model)["input_ids"]
    torch._dynamo.reset()
    outputs = []
    for forward in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = DynamicCache(config=model.config)
        out = [forward(tokens, **{CACHE: cache}).logits[:, -1].repeat_interleave(beams, 0)]
        cache.batch_repeat_interleave(beams)
        for token in range(3):
            cache.reorder_cache(torch.arange(2 * beams).flip(0))
            out.append(forward(torch.full((2 * beams, 1), 5 + token), **{CACHE: cache}).logits[:, -1])
        outputs.append(torch.stack(out))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_continuous_batching(mode):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "eos_token_id": None}))
    model = ipex.llm.optimize(model.eval(), inplace=True)
    prompts = [[3, 9, 4, 11, 7], [5, 6], [8, 3, 12]]
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # and not all of the memory
    with mode():
        alone = [model.generate(torch.tensor([p]), generation_config=options)[0, len(p) :].tolist() for p in prompts]
        together = [result.generated_tokens for result in model.generate_batch(prompts, options, small).values()]
    assert sorted(together) == sorted(alone)
    assert model.config._attn_implementation == "ipex_quant"
