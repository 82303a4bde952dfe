"""transformers' own `from_pretrained(gguf_file=...)` after `register_with_transformers`."""

import pytest
import torch
import transformers
from transformers.quantizers import auto

import ipex_quant as ipex
from ipex_quant.llm.gguf import provisional_config
from ipex_quant.nn import QuantizedModule

configs = pytest.importorskip("transformers.integrations.gguf").GGUF_CONFIG_ARCHS
pytest.importorskip("accelerate")  # which transformers asks for

VARIANTS = {"mixtral": "llama", "gemma4-experts": "gemma4"}
TOKENS = [f"<{number}>" for number in range(96)]
IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture
def registered():
    """Registers GGUF, and checks that all is as before once it is taken back."""
    mappings = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING, configs)
    assert ipex.llm  # which registers what `save` writes
    before = [dict(each) for each in mappings]
    ipex.llm.register_with_transformers(["gguf"])
    ipex.llm.register_with_transformers(["gguf"])  # changes nothing
    yield
    ipex.llm.unregister_from_transformers()
    assert before == list(mappings)


@pytest.mark.parametrize("name", ["gemma", "gemma4-experts", "gpt-oss", "lfm2", "llama-tied", "mixtral", "qwen3moe"])
def test_the_model_is_quantized(name, registered, make_tiny, gguf_of):
    model = make_tiny(name)
    arch = VARIANTS.get(name, name).removesuffix("-tied")
    path = gguf_of(model, name, arch, "Q8_0", **{f"{arch}.vocab_size": 96})
    expected = ipex.llm.from_pretrained(path, torch.float32)
    options = {"gguf_file": path.name, "output_loading_info": True}
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    assert not any(info.values())
    assert sum(isinstance(each, QuantizedModule) for each in loaded.modules()) > 10
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    ipex.llm.save(loaded, path.parent / "saved")
    assert torch.equal(ipex.llm.load(path.parent / "saved")(IDS).logits, expected(IDS).logits)


def test_what_only_tensors_tell_and_what_the_user_says(registered, make_tiny, gguf_of, write_gguf, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = make_tiny("llama-tied", rope_parameters=rope)
    usual = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    path = gguf_of(model, "llama-tied", "llama", **{"llama.vocab_size": 96})
    file = ipex.checkpoints.open_gguf(path)
    tensors = {name: tensor.stored[...] for name, tensor in file.tensors.items()}
    tensors["rope_freqs.weight"] = usual / model.model.rotary_emb.inv_freq
    path = write_gguf(tmp_path / "scaled.gguf", file.metadata, tensors)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, use_cache=False)
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    assert (loaded.config.use_cache, loaded.dtype) == (False, torch.bfloat16)
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(loaded.float()(IDS).logits, model(IDS).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "qwen35moe"])
def test_dequantizing_stays_with_transformers(name, registered, make_tiny, gguf_of):
    numbers = {
        f"{name}.vocab_size": 96,
        f"{name}.rope.dimension_sections": [2, 1, 1, 0],
        "tokenizer.ggml.tokens": TOKENS,
    }
    path = gguf_of(make_tiny(name), name, name, "values", **numbers)
    dequantize = transformers.GgufConfig(dequantize=True)
    options = {"gguf_file": path.name, "quantization_config": dequantize, "dtype": torch.float32}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    assert not any(isinstance(each, QuantizedModule) for each in loaded.modules())
    ipex.llm.unregister_from_transformers()
    stock = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = ipex.llm.from_pretrained(path, torch.float32)
    for each in (loaded, stock):
        torch.testing.assert_close(each(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_models_that_transformers_has_not(registered, write_gguf, tmp_path):
    numbers = {"context_length": 128, "embedding_length": 64, "block_count": 2, "attention.key_length": 16}
    numbers |= {"attention.head_count": [4, 0], "attention.head_count_kv": [4, 0], "feed_forward_length": 64}
    numbers |= {"attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 96}
    metadata = {"general.architecture": "deci", **{f"deci.{key}": number for key, number in numbers.items()}}
    write_gguf(tmp_path / "deci.gguf", metadata, {"token_embd.weight": torch.ones(96, 64)})
    with pytest.raises(ValueError, match=r"no deci models; use ipex_quant\.llm\.from_pretrained\(file\)"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="deci.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": -3}, "expected the number of tokens, got -3"),
        ({"attention.head_count": "x"}, r"attention\.head_count: expected a number, got 'x'"),
        ({"embedding_length": [1]}, r"embedding_length: expected a int"),
        ({"rope.dimension_count": -(1 << 40)}, r"rope\.dimension_count: expected a size"),
    ],
)
def test_what_is_absurd_is_named(changes, message):
    metadata = {"general.architecture": "llama", "llama.embedding_length": 64, "llama.vocab_size": 96}
    metadata |= {f"llama.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        provisional_config(metadata, ["token_embd.weight", "rope_freqs.weight"])


def test_older_releases_say_what_to_use(monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "gguf")
    with pytest.warns(UserWarning, match=r"stays as it is; use ipex_quant\.llm\.from_pretrained\(file\)"):
        ipex.llm.register_with_transformers(["gguf"])
    ipex.llm.unregister_from_transformers()
