"""Configurations out of metadata: what is missing or absurd, and scaled positions."""

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ipex_quant as ipex
from ipex_quant.checkpoints import open_gguf
from ipex_quant.llm.gguf import gguf_config

LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
}
TENSORS = {"token_embd.weight": torch.zeros(96, 64)}


@pytest.fixture
def config_of(tmp_path, write_gguf):
    def config(metadata=(), tensors=TENSORS):
        return gguf_config(open_gguf(write_gguf(tmp_path / "m.gguf", {**LLAMA, **dict(metadata)}, tensors)))

    return config


def test_a_small_llama(config_of):
    config = config_of({"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.bos_token_id": 4294967295})
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (4, 16, 96)
    assert (config.tie_word_embeddings, config.eos_token_id, config.bos_token_id) == (True, 7, None)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "clip"}, r"general\.architecture: expected one of bloom, .*got 'clip'"),
        ({"llama.block_count": 1 << 31}, r"llama\.block_count: expected a size, got 2147483648"),
        ({"llama.block_count": 20_000}, r"llama\.block_count: expected at most 10000"),
        ({"llama.block_count": "2"}, r"llama\.block_count: expected a int, got '2'"),
        ({"llama.embedding_length": 0}, r"llama\.embedding_length: expected a size, got 0"),
        ({"llama.attention.key_length": 1 << 30}, r"llama\.attention\.key_length: expected a size"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon: expected a float"),
        ({"llama.rope.freq_base": -1.0}, r"rope\.freq_base: expected a number above 0, got -1\.0"),
        ({"llama.rope.freq_base": math.inf}, r"rope\.freq_base: expected a finite number, got inf"),
        ({"llama.rope.scaling.factor": math.nan}, r"rope\.scaling\.factor: expected a finite number, got nan"),
        ({"llama.rope.scaling.factor": 0.0}, r"rope\.scaling\.factor: expected a number above 0, got 0\.0"),
        ({"llama.rope.scaling.original_context_length": 0}, "original_context_length: expected a number above 0"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count: expected the 16 of a head, got 8"),
        ({"llama.attention.head_count": 3}, "its metadata make no configuration of a llama"),
        ({"llama.attention.head_count_kv": 0}, r"head_count_kv: expected a divisor of 4 heads, got 0"),
        ({"llama.attention.head_count_kv": 3}, r"head_count_kv: expected a divisor of 4 heads, got 3"),
        (
            {"llama.expert_count": 4, "llama.expert_used_count": 5},
            r"expert_used_count: expected at most 4, got 5",
        ),
        ({"llama.rope.scaling.type": "x"}, r"rope\.scaling\.type: expected none, linear, yarn or longrope, got 'x'"),
    ],
)
def test_what_is_absurd_is_named(config_of, metadata, message):
    with pytest.raises(ValueError, match=message):
        config_of(metadata)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("t5", {"decoder_block_count": 1 << 40}, "decoder_block_count: expected 1 to 10000 layers"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: expected a number above 0"),
        ("gemma3", {"rope.freq_base_swa": -1.0}, r"rope\.freq_base_swa: expected a number above 0"),
        ("phi3", {"rope.dimension_count": 1 << 40}, r"rope\.dimension_count: expected the 16 of a head"),
        ("phi3", {"attention.sliding_window": -1}, r"sliding_window: expected a size, got -1"),
        ("lfm2", {"rope.dimension_count": 8}, r"rope\.dimension_count: expected the 16 of a head, got 8"),
        ("lfm2", {"attention.head_count_kv": [0, 3]}, r"head_count_kv: expected a divisor of 4 heads, got 3"),
        ("gemma4", {"attention.sliding_window_pattern": [True] * 6}, "the last has none, got"),
        ("gemma4", {"attention.sliding_window_pattern": [False]}, "whether each of 6 layers has a window"),
        ("gemma4", {"attention.shared_kv_layers": 6}, "shared_kv_layers: expected fewer than all, got 6"),
        ("gemma4", {"attention.head_count_kv": [2, 1, 2, 2, 2, 2]}, "expected one number of layers of a kind"),
        ("gemma4", {"feed_forward_length": [64, 128] * 3}, "expected one width, or twice of it in the last 2 layers"),
        ("gemma4", {"rope.dimension_count_swa": 8}, "expected whole heads to be rotated, got 8 of 16"),
        ("gemma4", {"attention.key_length": 64, "rope.dimension_count": 64}, r"rope_freqs\.weight: expected 32 floats"),
        ("gemma4-experts", {"expert_used_count": 5}, "expert_used_count: expected at most 4, got 5"),
        ("qwen35", {"nextn_predict_layers": -(1 << 40)}, "nextn_predict_layers: expected fewer than all layers"),
        ("qwen35", {"rope.dimension_sections": [1 << 40]}, r"rope\.dimension_sections: expected sizes"),
    ],
)
def test_what_is_absurd_in_one_architecture(name, metadata, message, make_tiny, gguf_of):
    arch = name.removesuffix("-experts")
    own = {f"{arch}.{key}": value for key, value in metadata.items()}
    path = gguf_of(make_tiny(name), name, arch, **own)
    with pytest.raises(ValueError, match=message):
        gguf_config(open_gguf(path))


@pytest.mark.parametrize(
    ("name", "key"),
    [("gpt2", "context_length"), ("t5", "embedding_length"), ("t5", "attention.relative_buckets_count")],
)
def test_nothing_is_made_that_no_tensor_could_fill(name, key, make_tiny, gguf_of):
    path = gguf_of(make_tiny(name), name, name, "Q8_0", **{f"{name}.{key}": (1 << 31) - 1})
    with pytest.raises(ValueError, match="elements in tensors that are not quantized, of which the checkpoint has"):
        ipex.llm.from_pretrained(path)


def test_the_vocabulary_is_that_of_the_embedding(config_of):
    with pytest.raises(ValueError, match=r"token_embd\.weight: missing"):
        config_of((), {})


def test_scaled_positions(config_of):
    linear = config_of({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert linear.rope_parameters == {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
    yarn = {"type": "yarn", "factor": 8.0, "original_context_length": 512}
    config = config_of({f"llama.rope.scaling.{key}": value for key, value in yarn.items()})
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["original_max_position_embeddings"] == 512


def frequencies(config):
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")[0]


def test_factors_of_llama_3_are_recognized(config_of):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_type": "llama3"}
    expected = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(scaling))
    plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = {"rope_freqs.weight": plain / frequencies(expected)}
    config = config_of((), TENSORS | factors)
    assert config.rope_parameters == scaling
    torch.testing.assert_close(frequencies(config), frequencies(expected), rtol=1e-5, atol=0)


def test_other_factors_divide_the_frequencies(config_of):
    factors = torch.linspace(1, 5, 8)
    config = config_of((), TENSORS | {"rope_freqs.weight": factors})
    expected = 500000.0 ** (-torch.arange(0, 16, 2) / 16) / factors
    torch.testing.assert_close(frequencies(config), expected, rtol=1e-5, atol=0)
    assert ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1] == 1
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: expected numbers above 0"):
        config_of((), TENSORS | {"rope_freqs.weight": -factors})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: expected a row of floats"):
        config_of((), TENSORS | {"rope_freqs.weight": factors[None]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"lacks 1 tensors of a LlamaForCausalLM, .*layers\.1\.mlp\.up_proj"),
        (lambda t: t.pop("output_norm.weight"), r"lacks 1 tensors of a LlamaForCausalLM, .*model\.norm\.weight"),
        (
            lambda t: t.update({"blk.7.ffn_up.weight": torch.ones(2, 2)}),
            r"1 tensors have no place in the architecture 'llama': \['blk\.7\.ffn_up\.weight'\]",
        ),
        (lambda t: t.update({"blk.0.ffn_up.weight": torch.ones(2, 2)}), r"do not fit a LlamaForCausalLM: .*up_proj"),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_tensors_that_are_missing_or_do_not_fit(kind, change, message, make_tiny, gguf_of, tmp_path, write_gguf):
    path = gguf_of(make_tiny("llama"), "llama", "llama", kind)
    file = open_gguf(path)
    tensors = {
        name: (tensor.kind, tensor.stored[...]) if tensor.kind else tensor.stored[...]
        for name, tensor in file.tensors.items()
    }
    change(tensors)
    with pytest.raises(ValueError, match=message):
        ipex.llm.from_pretrained(write_gguf(tmp_path / "changed.gguf", file.metadata, tensors))
