import threading

import pytest
import torch
import transformers
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

import ipex_quant as ipex
from ipex_quant import ops
from ipex_quant.llm import continuous
from ipex_quant.llm.decoder import layer as decoder_layer
from ipex_quant.llm.decoder import step

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, SIZES),
    "qwen3": (transformers.Qwen3ForCausalLM, {**SIZES, "head_dim": 16}),
    "window": (transformers.MistralForCausalLM, {**SIZES, "sliding_window": 12}),
    "window of whole blocks": (transformers.MistralForCausalLM, {**SIZES, "sliding_window": 16}),
    "some windows": (
        transformers.Gemma2ForCausalLM,
        {**SIZES, "head_dim": 8, "sliding_window": 12, "attn_logit_softcapping": 5.0},
    ),
    "stock layers": (transformers.GPTNeoXForCausalLM, {**SIZES, "num_key_value_heads": 4}),
}
PAGE = 8


def build(name, **options):
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return ipex.llm.optimize(model, inplace=True, **options)


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def options(new=12, **others):
    return transformers.GenerationConfig(**{"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **others})


def twice(new=12):
    """Two sequences of each prompt, which are sampled from one token."""
    return options(new, num_return_sequences=2, do_sample=True, top_k=1)


def alone(model, prompts, new=12):
    generated = (model.generate(torch.tensor([p]), generation_config=options(new)) for p in prompts)
    return [ids[0, len(p) :].tolist() for p, ids in zip(prompts, generated, strict=True)]


def config(**others):
    return ContinuousBatchingConfig(**{"num_blocks": 40, "max_batch_tokens": 32, "page_size": PAGE, **others})


def together(model, prompts, new=12, **others):
    results = model.generate_batch(prompts, options(new), config(**others))
    assert not [result.error for result in results.values() if result.error]
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(name):
    model = build(name)
    # whole blocks, parts of one, prompts in several steps, all with others that decode
    prompts = prompts_of(1, 5, PAGE, PAGE + 1, 21, 3, 50, 2 * PAGE, 12)
    assert together(model, prompts) == alone(model, prompts)
    assert model.config._attn_implementation == "ipex_quant"


def test_each_layer_reads_blocks_and_gathers_nothing(monkeypatch):
    model, calls = build("llama"), []
    attend = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    manager = model.init_continuous_batching(options(4), config())
    monkeypatch.setattr(FullAttentionCacheAllocator, "update", None)
    manager.start()
    name = manager.add_request(prompts_of(5)[0])
    assert len(manager.get_result(name, timeout=30).generated_tokens) == 4
    manager.stop(block=True)
    assert len(calls) == 4 * model.config.num_hidden_layers


def test_fused_layers_take_part(monkeypatch):
    model = build("llama", quantization_config=ipex.quantization.get_weight_only_quant_qconfig_mapping())
    prompts = prompts_of(4, 7)
    expected = alone(model, prompts)
    monkeypatch.setattr(decoder_layer.FusedLayer, "call_stock", None)
    assert together(model, prompts) == expected


@pytest.mark.parametrize("name", ["llama", "qwen3", "window of whole blocks"])
def test_few_tokens_pass_all_layers_in_one_call(name, monkeypatch):
    """Those that only decode, and short prompts; layers with windows only where their blocks are in order."""
    model, calls = build(name, quantization_config=ipex.quantization.get_weight_only_quant_qconfig_mapping()), []
    prompts = prompts_of(4, 7, 2, 30)
    expected = alone(model, prompts)
    native = step.decoder_layers
    monkeypatch.setattr(step, "decoder_layers", lambda x, *args: calls.append(args[1]) or native(x, *args))
    assert together(model, prompts) == expected
    whole = [call for call in calls if len(call.starts) == model.config.num_hidden_layers]
    assert all(call.pages for call in calls)
    assert len(whole) >= 12 or name == "window of whole blocks"


def test_prompts_with_a_common_beginning_share_blocks():
    model = build("llama")
    beginning, *ends = prompts_of(3 * PAGE, 3, 1, 6)
    prompts = [beginning + end for end in ends]
    expected = alone(model, prompts)
    manager = model.init_continuous_batching(options(), config())
    manager.start()
    for prompt, tokens in zip(prompts, expected, strict=True):
        name = manager.add_request(prompt)
        assert manager.get_result(name, timeout=30).generated_tokens == tokens
        ledger = manager.batch_processor.cache.cache_allocators["full_attention"].ledger
        assert len(ledger.hash_to_block) >= 3
    assert manager.batch_processor.cache.use_prefix_sharing
    manager.stop(block=True)


def test_a_full_cache_makes_requests_wait():
    model = build("llama")
    prompts = prompts_of(*range(9, 29))
    assert together(model, prompts, num_blocks=7) == alone(model, prompts)


def test_several_sequences_of_a_prompt():
    model = build("llama")
    prompts = prompts_of(5, 20)
    results = model.generate_batch(prompts, twice(8), config())
    expected = [tokens for tokens in alone(model, prompts, 8) for _ in range(2)]
    assert [result.generated_tokens for result in results.values()] == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "the prompt is empty"),
        ([5, 97], "the prompt has the token 97: expected numbers from 0 to 96"),
        ([5] * 310, "the prompt of 310 tokens and 12 new ones need more than the 320 tokens of the cache"),
    ],
)
def test_a_wrong_request_fails_alone(wrong, message):
    model = build("llama")
    prompts = prompts_of(5, 20, 9)
    results = model.generate_batch([prompts[0], wrong, *prompts[1:]], options(), config())
    first, failed, *others = results.values()
    assert failed.error.startswith(message)
    assert not failed.generated_tokens
    assert [each.generated_tokens for each in (first, *others)] == alone(model, prompts)


def test_a_wrong_request_with_several_sequences_fails_alone():
    model = build("llama")
    results = model.generate_batch([[], *prompts_of(5)], twice(), config())
    assert [bool(result.error) for result in results.values()] == [True, True, False, False]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_request_by_itself_raises_before_anyone_waits(streaming):
    model = build("llama")
    manager = model.init_continuous_batching(options(), config())
    manager.output_router.result_handlers["mine"] = None
    with pytest.raises(ValueError, match=r"^the prompt is empty"):
        manager.add_request([], request_id="mine", streaming=streaming)
    assert not manager.output_router.result_handlers
    with pytest.raises(ValueError, match="need more than the 320 tokens of the cache"):
        manager.add_request([5] * 20, max_new_tokens=301)


def test_a_window_needs_no_more_than_itself():
    model = build("window")
    prompts = prompts_of(100)
    assert together(model, prompts, new=60, num_blocks=4) == alone(model, prompts, new=60)


def test_a_cancelled_request_leaves_the_others_alone():
    model = build("llama")
    prompts = prompts_of(5, 9)
    manager = model.init_continuous_batching(options(60), config(num_blocks=100))
    manager.start()
    cancelled = manager.add_request(prompts[0], streaming=True)
    kept = manager.add_request(prompts[1])
    assert manager.get_result(timeout=30).request_id == cancelled
    manager.cancel_request(cancelled)
    result = manager.get_result(timeout=30)
    while result.request_id != kept:
        result = manager.get_result(timeout=30)
    assert result.generated_tokens == alone(model, prompts[1:], 60)[0]
    manager.stop(block=True)


def test_generate_while_a_batch_runs():
    model = build("llama")
    prompts = prompts_of(5, 9, 30)
    expected, found = alone(model, prompts, 40), []
    thread = threading.Thread(target=lambda: found.append(together(model, prompts, 40)))
    thread.start()
    during = alone(model, prompts, 40)
    thread.join()
    assert during == expected
    assert found == [expected]


def test_int8_caches_are_named():
    model = build("llama", kv_cache_dtype=torch.int8)
    with pytest.warns(UserWarning, match="kv_cache_dtype: continuous batching keeps .* not in int8"):
        results = model.generate_batch(prompts_of(5), options(), config())
    assert [len(result.generated_tokens) for result in results.values()] == [12]


def test_the_cache_has_room_for_the_requests_that_are_known(monkeypatch):
    model, made = build("llama"), []
    start = continuous.PagedManager.start
    monkeypatch.setattr(
        continuous.PagedManager, "start", lambda self: made.append(self.batch_processor.cache) or start(self)
    )
    prompts = prompts_of(*range(1, 30))
    assert together(model, prompts, num_blocks=None) == alone(model, prompts)
    blocks = len(prompts) * 6  # of 29 + 12 tokens
    assert blocks / 0.85 < made[0].num_blocks < blocks / 0.85 + 4


def test_a_cache_without_a_size_is_limited(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(continuous, "MAX_CACHE_BYTES", 1 << 22)
    small = model.init_continuous_batching(options(), config(num_blocks=None)).batch_processor.cache.cache_tensor
    assert 1 << 20 < small.nbytes < 1 << 22
    asked = config(num_blocks=None, max_memory_percent=0.001)
    assert model.init_continuous_batching(options(), asked).batch_processor.cache.cache_tensor.nbytes > 1 << 22


def test_steps_have_few_tokens_unless_asked_for_more():
    model = build("llama")
    manager = model.init_continuous_batching(options(), config(max_batch_tokens=None))
    assert manager.batch_processor.cache.max_batch_tokens == continuous.MAX_BATCH_TOKENS


def test_another_attention_keeps_transformers_own():
    model = build("llama")
    model.set_attn_implementation("sdpa")
    prompts = prompts_of(5, 20)
    assert together(model, prompts) == alone(model, prompts)


@pytest.mark.parametrize("change", ["layout", "arguments"])
def test_another_cache_is_an_error(monkeypatch, change):
    model = build("llama")
    if change == "layout":
        blocks = continuous._blocks
        monkeypatch.setattr(continuous, "_blocks", lambda *args: tuple(x.flip(0) for x in blocks(*args)))
    else:
        monkeypatch.delitem(continuous.PagedAttentionArgs.__annotations__, "read_index")
    with pytest.raises(RuntimeError, match="has another paged cache than the one that the native attention reads"):
        model.generate_batch(prompts_of(5), options(), config())


def test_block_tables_are_an_error():
    with pytest.raises(RuntimeError, match="expected no block tables on a CPU"):
        continuous.paged_arguments({"block_table": torch.zeros(1, 1, 1), "cache": None})
