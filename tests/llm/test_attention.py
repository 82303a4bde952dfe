import copy

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from ipex_quant.llm.attention import WindowMask, attention_forward, attention_mask, use_native_attention
from ipex_quant.llm.cache.layers import NativeLayer
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.nn.deferred import DeferredTensor


class Module(torch.nn.Module):
    is_causal = True


def tensors(queries, keys, batch=2, heads=4, kv_heads=2, size=8, value_size=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def expected(query, key, value, allowed, bias=0.0, scale=None):
    """[B, Lq, H, Dv] by torch's own attention, with a bool mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf) + bias
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)


def causal(queries, keys, window=None):
    distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys + 1))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 9), (4, 9)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_without_a_mask_queries_are_the_last_of_the_keys(queries, keys, scaling):
    q, k, v = tensors(queries, keys, value_size=6)
    out, weights = attention_forward(Module(), q, k, v, None, scaling=scaling)
    torch.testing.assert_close(out, expected(q, k, v, causal(queries, keys), scale=scaling))
    assert weights is None
    assert out.is_contiguous()


def test_weights_that_are_asked_for_warn():
    with pytest.warns(UserWarning, match="the native attention has no weights to return"):
        attention_forward(Module(), *tensors(4, 4), None, output_attentions=True)


def test_not_causal():
    q, k, v = tensors(4, 9)
    full = expected(q, k, v, torch.ones(4, 9, dtype=torch.bool))
    torch.testing.assert_close(attention_forward(Module(), q, k, v, None, is_causal=False)[0], full)
    module = Module()
    module.is_causal = False
    torch.testing.assert_close(attention_forward(module, q, k, v, None)[0], full)


def test_bool_and_float_masks():
    q, k, v = tensors(4, 9)
    allowed = torch.rand(2, 1, 4, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    reference = expected(q, k, v, allowed)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        torch.testing.assert_close(attention_forward(Module(), q, k, v, mask)[0], reference)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_position_bias(mask):
    q, k, v = tensors(4, 4)
    bias = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    allowed = causal(4, 4) if mask is None else torch.eye(4, dtype=torch.bool).logical_not().expand(2, 1, 4, 4)
    given = {None: None, "bool": allowed, "float": torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)}[mask]
    out, _ = attention_forward(Module(), q, k, v, given, position_bias=bias)
    torch.testing.assert_close(out, expected(q, k, v, allowed, bias))


@pytest.mark.parametrize(("queries", "keys", "window"), [(7, 7, 3), (1, 3, 3), (4, 9, 3), (4, 6, 3)])
def test_window_without_padding_is_no_tensor(queries, keys, window):
    config = transformers.MistralConfig(sliding_window=window)
    function = sliding_window_causal_mask_function(window)
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": keys - queries}
    mask = attention_mask(**sizes, mask_function=function, local_size=window, config=config)
    q, k, v = tensors(queries, keys)
    allowed = sdpa_mask(**sizes, mask_function=function, local_size=window, allow_is_causal_skip=False)
    torch.testing.assert_close(attention_forward(Module(), q, k, v, mask)[0], expected(q, k, v, allowed))
    if keys <= window:
        assert mask is None
    else:
        assert isinstance(mask, DeferredTensor)
        assert mask._values is None  # the attention has not looked
        assert torch.equal(mask & True, allowed)


def test_chunked_attention_is_not_taken_for_a_window():
    config = transformers.Llama4TextConfig(attention_chunk_size=4)

    def function(batch, head, q, k):
        return (q // 4 == k // 4) & (k <= q)

    mask = attention_mask(1, 6, 6, mask_function=function, local_size=4, config=config)
    rows = torch.arange(6)
    assert torch.equal(mask[0, 0], function(0, 0, rows.unsqueeze(1), rows))


@pytest.mark.parametrize(
    "arguments",
    [
        {"q_offset": 0, "kv_length": 8},  # a static cache: keys that are yet to come
        {"q_offset": 4, "kv_length": 8, "attention_mask": torch.arange(8).expand(2, 8) > 2},
        {"q_offset": 4, "kv_length": 8, "allow_is_causal_skip": False},
        {"q_offset": torch.tensor(4), "kv_length": 8},
    ],
)
def test_all_other_masks_are_those_of_sdpa(arguments):
    got = attention_mask(batch_size=2, q_length=4, **arguments)
    assert torch.equal(got, sdpa_mask(batch_size=2, q_length=4, **{**arguments, "allow_is_causal_skip": False}))


def test_no_mask_without_padding():
    for padding in (None, torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)):
        assert attention_mask(2, 4, 8, q_offset=4, attention_mask=padding) is None
    assert attention_mask(2, 4, 8, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is None


@pytest.mark.parametrize("dtype", [None, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("beams", [1, 3])
def test_reads_what_a_layer_stores(dtype, beams):
    layer = NativeLayer(dtype)
    q, k, v = tensors(1, 40)
    layer.update(k, v)
    layer.batch_repeat_interleave(beams)
    q, k1, v1 = tensors(1, 1, batch=2 * beams)
    keys, values = layer.update(k1, v1)
    out, _ = attention_forward(Module(), q, keys, values, None)
    reference = expected(q, keys + 0, values + 0, causal(1, 41))
    tolerance = {} if dtype is None else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(out, reference, **tolerance)
    torch.testing.assert_close(layer.attention(q, scale=8**-0.5), reference, **tolerance)


def test_deferred_values_are_not_computed():
    layer = NativeLayer(torch.int8)
    q, k, v = tensors(3, 3)
    keys, values = layer.update(k, v)
    attention_forward(Module(), q, keys, values, WindowMask((2, 1, 3, 3), 2, q.device))
    assert keys._values is None
    assert values._values is None


def test_gradients_flow():
    q, k, v = (x.requires_grad_() for x in tensors(4, 4))
    with torch.enable_grad():
        attention_forward(Module(), q, k, v, None)[0].square().sum().backward()
        got = q.grad.clone(), k.grad.clone(), v.grad.clone()
        q.grad = k.grad = v.grad = None
        expected(q, k, v, causal(4, 4)).square().sum().backward()
    for a, b in zip(got, (q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("anew", ["keys", "values"])
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_keys_or_values_that_the_model_computed_anew(dtype, anew):
    layer = NativeLayer(dtype)
    q, k, v = tensors(1, 5)
    layer.update(k, v)
    layer.batch_repeat_interleave(2)
    q, k, v = tensors(1, 1, batch=4)
    keys, values = layer.update(k, v)
    keys, values = (keys * 2, values) if anew == "keys" else (keys, values * 2)
    out, _ = attention_forward(Module(), q, keys, values, None)
    torch.testing.assert_close(out, expected(q, keys + 0, values + 0, causal(1, 6)), rtol=1e-3, atol=1e-4)


def test_results_can_be_viewed():
    q, k, v = tensors(4, 4)
    with torch.enable_grad():
        assert attention_forward(Module(), q.requires_grad_(), k, v, None)[0].is_contiguous()


def test_dropout():
    q, k, v = tensors(3, 3)
    torch.manual_seed(0)
    out = torch.stack([attention_forward(Module(), q, k, v, None, dropout=0.25)[0] for _ in range(400)])
    assert not torch.equal(out[0], out[1])
    torch.testing.assert_close(out.mean(0), attention_forward(Module(), q, k, v, None)[0], rtol=0.1, atol=0.2)


def test_autocast():
    q, k, v = tensors(3, 3)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves the dtypes of what it does not multiply as they are
        out = attention_forward(Module(), q, k, v.bfloat16(), None)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected(q, k, v, causal(3, 3)), rtol=0.02, atol=0.02)


def test_sinks_are_refused():
    q, k, v = tensors(2, 2)
    with pytest.raises(ValueError, match="sinks"):
        attention_forward(Module(), q, k, v, None, s_aux=torch.zeros(4))


def test_any_model_gives_the_same_logits(any_model, logits):
    reference = logits(any_model)
    use_native_attention(any_model)
    torch.testing.assert_close(logits(any_model), reference, rtol=1e-4, atol=1e-4)


def test_modules_with_an_attention_of_their_own_are_named(llama):
    assert use_native_attention(llama) == []
    assert llama.config._attn_implementation == "ipex_quant"
    config = transformers.MptConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=32)
    assert use_native_attention(transformers.MptForCausalLM(config)) == ["transformer.blocks.0.attn"]
    sinks = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32, "head_dim": 8}
    config = transformers.GptOssConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=32, **sinks
    )
    model = transformers.GptOssForCausalLM(config)
    assert use_native_attention(model) == ["model.layers.0.self_attn"]
    assert model.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="transformers model"):
        use_native_attention(torch.nn.Linear(2, 2))


def test_attention_weights_take_the_eager_attention(llama):
    other = copy.deepcopy(llama)
    use_native_attention(llama)
    llama.set_attn_implementation("eager")
    other.set_attn_implementation("eager")
    tokens = torch.arange(3, 9).unsqueeze(0)
    got, want = (model(tokens, output_attentions=True).attentions for model in (llama, other))
    torch.testing.assert_close(got, want)


def test_decoders_that_do_not_say_they_are_causal_stay_as_they_are(logits):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "block_size": 8, "num_global_tokens": 2}
    config = transformers.PegasusXConfig(vocab_size=96, **sizes, **heads)
    stock = transformers.PegasusXForConditionalGeneration(config).eval()
    model = copy.deepcopy(stock)
    assert use_native_attention(model)
    assert torch.equal(logits(model), logits(stock))


def test_tokens_after_a_prompt_whose_tokens_see_each_other():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    options = {"head_dim": 16, "intermediate_size": 32, "vocab_size": 96, "use_bidirectional_attention": True}
    stock = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, **options)).eval()
    model = copy.deepcopy(stock)
    assert not use_native_attention(model)
    tokens = torch.arange(3, 11)[None]
    results = []
    for each in (model, stock):
        first = each(tokens[:, :5])
        results.append((first.logits, each(tokens[:, 5:], **{CACHE: first[CACHE]}).logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
