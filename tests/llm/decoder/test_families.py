import copy
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache

import ipex_quant as ipex
from ipex_quant.llm.attention import register
from ipex_quant.llm.cache.layers import NativeLayer, SlidingLayer
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.decoder.families import FAMILIES
from ipex_quant.llm.decoder.layer import FusedLayer, fuse_decoder
from ipex_quant.nn import QuantizedModule
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from ..conftest import random_model

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
OPT = {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}
OLD_NAMES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64, "vocab_size": 96}
MPT = {"d_model": 64, "n_layers": 2, "expansion_ratio": 4, "max_seq_len": 64, "vocab_size": 96}
HALF_ROTARY = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
LLAVA = {
    "text_config": {"model_type": "llama", **GROUPED},
    "vision_config": {"model_type": "clip_vision_model", **VISION},
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, GROUPED),
    "llama-bias": (transformers.LlamaForCausalLM, {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-gelu": (transformers.LlamaForCausalLM, {**GROUPED, "hidden_act": "gelu"}),
    "llama-tanh": (transformers.LlamaForCausalLM, {**GROUPED, "hidden_act": "tanh"}),
    "llama-head-size": (transformers.LlamaForCausalLM, {**GROUPED, "head_dim": 32}),
    "mistral": (transformers.MistralForCausalLM, {**GROUPED, "sliding_window": None}),
    "mistral-window": (transformers.MistralForCausalLM, {**GROUPED, "sliding_window": 4}),
    "mixtral": (transformers.MixtralForCausalLM, {**EXPERTS, "num_local_experts": 4}),
    "qwen2": (transformers.Qwen2ForCausalLM, GROUPED),
    "qwen3": (transformers.Qwen3ForCausalLM, {**GROUPED, "head_dim": 32}),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        {**EXPERTS, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "gemma": (transformers.GemmaForCausalLM, {**GROUPED, "head_dim": 32}),
    "glm": (transformers.GlmForCausalLM, {**GROUPED, "head_dim": 16, "attention_bias": True}),
    "phi3": (transformers.Phi3ForCausalLM, GROUPED),
    "phi": (transformers.PhiForCausalLM, GROUPED),
    "stablelm": (transformers.StableLmForCausalLM, {**GROUPED, "rope_parameters": HALF_ROTARY}),
    "stablelm-parallel": (transformers.StableLmForCausalLM, {**GROUPED, "use_parallel_residual": True}),
    "gpt-neox": (transformers.GPTNeoXForCausalLM, {**SIZES, "rope_parameters": HALF_ROTARY}),
    "gpt-neox-sequential": (transformers.GPTNeoXForCausalLM, {**SIZES, "use_parallel_residual": False}),
    "gpt-j": (transformers.GPTJForCausalLM, {**OLD_NAMES, "rotary_dim": 8}),
    "codegen": (transformers.CodeGenForCausalLM, {**OLD_NAMES, "n_head": 8, "rotary_dim": 4}),
    "opt": (transformers.OPTForCausalLM, OPT),
    "opt-post-norm": (transformers.OPTForCausalLM, {**OPT, "do_layer_norm_before": False}),
    "falcon-multi-query": (transformers.FalconForCausalLM, SIZES),
    "falcon-new": (transformers.FalconForCausalLM, {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        transformers.FalconForCausalLM,
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-alibi": (
        transformers.FalconForCausalLM,
        {**SIZES, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom": (transformers.BloomForCausalLM, {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "bloom-6-heads": (transformers.BloomForCausalLM, {"hidden_size": 96, "n_layer": 2, "n_head": 6, "vocab_size": 96}),
    "mpt": (transformers.MptForCausalLM, {**MPT, "n_heads": 4}),
    "mpt-6-heads": (transformers.MptForCausalLM, {**MPT, "d_model": 96, "n_heads": 6}),
    "gpt-bigcode": (transformers.GPTBigCodeForCausalLM, OLD_NAMES),
    "git": (transformers.GitForCausalLM, {**SIZES, "vision_config": VISION}),
    "llava": (transformers.LlavaForConditionalGeneration, LLAVA),
}
"""Small random models: class and configuration."""

RECIPES = {
    "int4": lambda: get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32),
    "int4-int8": lambda: get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    ),
    "int8": lambda: ipex.quantization.default_dynamic_qconfig_mapping,
}

SLIDING = {**GROUPED, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SCALED_ROPE = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_theta": 10000.0,
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 8,
}
VARIANTS = {
    "llama-scaled-rope": (transformers.LlamaForCausalLM, {**GROUPED, "rope_parameters": SCALED_ROPE}),
    "qwen2-window": (transformers.Qwen2ForCausalLM, {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3-window": (transformers.Qwen3ForCausalLM, {**SLIDING, "use_sliding_window": True, "attention_bias": True}),
    "phi3-long-rope": (transformers.Phi3ForCausalLM, {**GROUPED, "rope_parameters": LONG_ROPE, "sliding_window": 6}),
    "phi-norms": (transformers.PhiForCausalLM, {**GROUPED, "qk_layernorm": True}),
    "stablelm-norms": (transformers.StableLmForCausalLM, {**GROUPED, "qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm-norms-parallel": (
        transformers.StableLmForCausalLM,
        {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "opt-without-vectors": (
        transformers.OPTForCausalLM,
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "mpt-clip": (transformers.MptForCausalLM, {**MPT, "n_heads": 4, "attn_config": {"clip_qkv": 0.8}}),
    "bloom-normed": (
        transformers.BloomForCausalLM,
        {
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 96,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "gpt-bigcode-multi-head": (transformers.GPTBigCodeForCausalLM, {**OLD_NAMES, "multi_query": False}),
    "falcon-multi-head": (transformers.FalconForCausalLM, {**SIZES, "multi_query": False}),
    "gpt2": (transformers.GPT2LMHeadModel, {**OLD_NAMES, "scale_attn_by_inverse_layer_idx": True}),
    "gemma2": (transformers.Gemma2ForCausalLM, {**SLIDING, "query_pre_attn_scalar": 12}),
    "gemma3": (transformers.Gemma3ForCausalLM, {**SLIDING, "query_pre_attn_scalar": 12}),
    "glm4": (transformers.Glm4ForCausalLM, {**GROUPED, "head_dim": 16, "attention_bias": True}),
    "olmo2": (transformers.Olmo2ForCausalLM, GROUPED),
    "olmo3": (transformers.Olmo3ForCausalLM, SLIDING),
    "olmoe": (transformers.OlmoeForCausalLM, {**EXPERTS, "num_experts": 4}),
    "granite": (
        transformers.GraniteForCausalLM,
        {**GROUPED, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "cohere": (transformers.CohereForCausalLM, GROUPED),
    "cohere-norms": (transformers.CohereForCausalLM, {**GROUPED, "use_qk_norm": True}),
    "cohere2": (transformers.Cohere2ForCausalLM, SLIDING),
    "smollm3": (transformers.SmolLM3ForCausalLM, {**GROUPED, "no_rope_layers": [1, 0]}),
    "starcoder2": (transformers.Starcoder2ForCausalLM, {**GROUPED, "sliding_window": None}),
    "qwen2-moe": (
        transformers.Qwen2MoeForCausalLM,
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "phimoe": (transformers.PhimoeForCausalLM, {**EXPERTS, "num_local_experts": 4}),
    "ministral": (transformers.MinistralForCausalLM, SLIDING),
    "seed-oss": (transformers.SeedOssForCausalLM, {**GROUPED, "head_dim": 16}),
    "helium": (transformers.HeliumForCausalLM, {**GROUPED, "head_dim": 16}),
    "ernie4-5": (transformers.Ernie4_5ForCausalLM, {**GROUPED, "head_dim": 16}),
}
"""Models with options that are not the usual ones, and of families that few people name."""

STOCK = {"olmoe-clip": (transformers.OlmoeForCausalLM, {**EXPERTS, "num_experts": 4, "clip_qkv": 1.0})}
"""Models of known families with an option that no family describes."""


def build(name):
    return random_model(*(MODELS | VARIANTS | STOCK)[name])


def fused(stock):
    """A fused copy."""
    model = copy.deepcopy(stock)
    assert len(fuse_decoder(model)) == 2, "every layer is fused"
    return model


def native_cache(config, **options):
    cache = DynamicCache(config=config)
    cache.layers = [
        SlidingLayer(layer.sliding_window, **options) if layer.is_sliding else NativeLayer(**options)
        for layer in cache.layers or [NativeLayer()] * 2
    ]
    return cache


def steps(model, padding, cache=None):
    """Logits of a prompt, then of two more tokens in one step, then of one, with `padding` zeros before sequence 1."""
    tokens = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    cache, logits, start = cache or DynamicCache(config=model.config), [], 0
    for end in (7, 9, 10):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        options = {"attention_mask": mask[:, :end], CACHE: cache, "use_cache": True}
        if padding:
            options["position_ids"] = positions
        logits.append(model(tokens[:, start:end], **options).logits)
        start = end
    rows = torch.cat(logits, 1)
    return torch.cat([rows[0], rows[1, padding:]])


@pytest.fixture
def _no_stock_layers(monkeypatch):
    def fail(layer, *args, **kwargs):
        pytest.fail(f"{layer.module} ran stock code")

    monkeypatch.setattr(FusedLayer, "call_stock", fail)


@pytest.mark.usefixtures("_no_stock_layers")
@pytest.mark.parametrize("name", MODELS | VARIANTS)
@pytest.mark.parametrize("padding", [0, 3])
def test_logits_are_those_of_the_stock_model(name, padding):
    if padding and name == "git":
        pytest.skip("the stock model with a cache attends to padding")
    stock = build(name)

    torch.testing.assert_close(steps(fused(stock), padding), steps(stock, padding), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_no_stock_layers")
@pytest.mark.parametrize("name", MODELS | VARIANTS)
@pytest.mark.parametrize("padding", [0, 3])
def test_a_native_cache_gives_the_same_logits(name, padding):
    if padding and name == "git":
        pytest.skip("the stock model with a cache attends to padding")
    stock = build(name)

    actual = steps(fused(stock), padding, native_cache(stock.config))

    torch.testing.assert_close(actual, steps(stock, padding), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "bloom"])
def test_a_cache_of_bytes_is_close(name):
    stock = build(name)
    cache = native_cache(stock.config, storage_dtype=torch.int8)

    actual, expected = steps(fused(stock), 3, cache), steps(stock, 3)

    assert cache.layers[0].keys.dtype == torch.float32
    assert 0 < (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.usefixtures("_no_stock_layers")
@pytest.mark.filterwarnings("ignore:most weights stay in float:UserWarning")
@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_layers_compute_what_they_do_in_the_stock_model(name, recipe):
    stock = ipex.llm.optimize(build(name), quantization_config=RECIPES[recipe](), inplace=True)

    padding = 0 if name == "git" else 3
    actual, expected = steps(fused(stock), padding), steps(stock, padding)

    if recipe == "int4":
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # A difference in the last bit of an activation can round to another code
    same = (actual - expected).abs().amax(-1) < 1e-4
    assert same.float().mean() > 0.5
    assert (actual - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_stock_model(name):
    stock = build(name)
    tokens = torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]), "max_new_tokens": 6, "do_sample": False}

    for beams in (1, 3):
        expected = stock.generate(tokens, num_beams=beams, **options)
        assert torch.equal(fused(stock).generate(tokens, num_beams=beams, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma", "phi3"])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_bfloat16_is_as_close_to_float32_as_the_stock_model(name, recipe):
    model = build(name)
    config = RECIPES[recipe]() if recipe else None
    exact = ipex.llm.optimize(model, quantization_config=config)
    stock = ipex.llm.optimize(model, dtype=torch.bfloat16, quantization_config=config)
    expected = steps(exact, 0)

    stock_error, error = ((steps(each, 0).float() - expected).norm() for each in (stock, fused(stock)))

    assert error < 1.3 * stock_error


def test_every_family_is_tested():
    layers = {type(module).__name__ for name in MODELS | VARIANTS for module in build(name).modules()}

    elsewhere = {name for name, ways in FAMILIES.items() if name.endswith("EncoderLayer") or any(w.cross for w in ways)}
    assert layers >= FAMILIES.keys() - elsewhere


def test_every_part_keeps_its_name_and_its_tensors():
    model = build("llama")
    before = dict(model.named_modules()), {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    assert fuse_decoder(model) == ["model.layers.0", "model.layers.1"]

    after = dict(model.named_modules()), {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert after == before


def test_layers_with_an_option_that_no_family_describes_stay_stock(caplog):
    model = build("olmoe-clip")

    with caplog.at_level("INFO", "ipex_quant"):
        assert fuse_decoder(model) == []

    assert "model.layers.0 stays stock" in caplog.text
    assert "clip_qkv" in caplog.text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_copies_have_weights_of_their_own(copied, recipe):
    model = ipex.llm.optimize(build("llama"), quantization_config=RECIPES[recipe](), inplace=True)
    fuse_decoder(model)
    expected = steps(model, 0)

    copy_of_it = copied(model)
    assert copy_of_it.model.layers[0].forward.module is copy_of_it.model.layers[0]
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.load_state_dict({name: 0 * tensor for name, tensor in module.state_dict().items()})

    assert not torch.allclose(steps(model, 0), expected)
    assert torch.equal(steps(copy_of_it, 0), expected)


def test_weights_loaded_later_count():
    model, other = build("gemma"), build("gemma")
    for parameter in other.parameters():
        parameter.mul_(1.1)
    fuse_decoder(model)

    model.load_state_dict(other.state_dict())

    torch.testing.assert_close(steps(model, 0), steps(other, 0), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_no_stock_layers")
@pytest.mark.parametrize("cached", [False, True])
def test_tokens_of_an_image_see_each_other(cached):
    stock = build("git")
    tokens = torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(1))
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {CACHE: native_cache(stock.config), "use_cache": True} if cached else {"use_cache": False}

    actual = fused(stock)(tokens, pixel_values=image, **options).logits

    torch.testing.assert_close(actual, stock(tokens, pixel_values=image).logits, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_no_stock_layers")
@pytest.mark.parametrize("name", ["phi3", "llama", "gpt-bigcode"])
def test_a_mask_may_show_later_tokens(name):
    stock = build(name)
    tokens = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(1))
    visible = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    visible[..., 2:5, 2:5] = True

    def logits(model, cache, mask):
        model(tokens[:, :2], **{CACHE: cache})
        return model(tokens[:, 2:], attention_mask=mask, **{CACHE: cache}).logits

    actual = logits(fused(stock), native_cache(stock.config), visible[:, :, 2:])

    expected = logits(stock, DynamicCache(config=stock.config), visible[:, :, 2:])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, logits(stock, DynamicCache(config=stock.config), None))


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_replaced_modules_count(copied):
    stock = build("llama")
    model = copied(fused(stock))
    plain = steps(model, 0)
    for each in (stock, model):
        projection = each.model.layers[1].self_attn.q_proj
        each.model.layers[1].self_attn.q_proj = torch.nn.Sequential(projection, torch.nn.ReLU())

    expected = steps(stock, 0)

    assert not torch.allclose(plain, expected)
    torch.testing.assert_close(steps(model, 0), expected, rtol=0, atol=1e-4)
    assert len(fuse_decoder(model)) == 1


def test_restored_layers_are_stock():
    model = build("llama")
    fuse_decoder(model)
    restore_forwards(model)

    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_are_those_of_the_stock_model():
    stock = build("llama")
    model = copy.deepcopy(stock)
    fuse_decoder(model)
    tokens = torch.randint(3, 96, (2, 7))

    with torch.enable_grad():
        for each in (stock, model):
            each(tokens, labels=tokens).loss.backward()

    for expected, actual in zip(stock.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_hidden_states_and_attention_weights_are_those_of_the_stock_model():
    stock = build("llama")
    model = copy.deepcopy(stock)
    fuse_decoder(model)
    tokens = torch.randint(3, 96, (2, 7))
    for each in (stock, model):
        each.set_attn_implementation("eager")

    expected, actual = (
        each(tokens, output_hidden_states=True, output_attentions=True, use_cache=False) for each in (stock, model)
    )

    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual.attentions, expected.attentions)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "ipex_quant"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_any_kind_of_mask_will_do(name, implementation):
    stock = build(name)
    model = fused(stock)
    register()
    model.set_attn_implementation(implementation)

    for padding in (0, 3):
        torch.testing.assert_close(steps(model, padding), steps(stock, padding), rtol=0, atol=1e-4)


def test_autocast_and_training_run_the_stock_model():
    model = build("llama")
    stock = copy.deepcopy(model)
    fuse_decoder(model)
    tokens = torch.randint(3, 96, (2, 7))

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens).logits, stock(tokens).logits)
    assert torch.equal(model.train()(tokens).logits, stock.train()(tokens).logits)


def test_hooks_within_a_layer_run():
    model = build("llama")
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(args))
    expected = steps(model, 0)
    calls = len(seen)

    actual = steps(fused(model), 0)

    assert len(seen) == 2 * calls
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gemma2", None),
        ("olmo2", None),
        ("cohere-norms", None),
        ("llama", "int4"),
        ("llama", "int8"),
        ("gpt-neox", "int4-int8"),
        ("bloom", "int8"),
    ],
)
def test_layers_compile_without_a_graph_break(name, recipe):
    model = build(name)
    if recipe:
        model = ipex.llm.optimize(model, quantization_config=RECIPES[recipe](), inplace=True)
    fuse_decoder(model)
    tokens = torch.randint(3, 96, (2, 7))
    expected = model(tokens, use_cache=False).logits
    torch.compiler.reset()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fused_model_is_saved_as_it_was(recipe, tmp_path):
    model = ipex.llm.optimize(build("llama"), quantization_config=RECIPES[recipe](), inplace=True)
    expected = steps(model, 0)
    fuse_decoder(model)

    ipex.llm.save(model, tmp_path / "saved")
    loaded = ipex.llm.load(tmp_path / "saved")

    assert torch.equal(steps(loaded, 0), expected)
    assert len(fuse_decoder(loaded)) == 2
