"""`export` to GGUF, read by a parser of the format's description that is written here."""

import struct

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ipex_quant as ipex
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.nn.weight_only_linear import QuantizedWeight
from ipex_quant.numerics import affine
from ipex_quant.quantization import WoqWeightDtype, WoqWeightQScheme, get_weight_only_quant_qconfig_mapping

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, {"num_key_value_heads": 2, "attention_bias": True}),
    "mistral": (transformers.MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (transformers.Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
}
NUMBERS = {0: "B", 1: "b", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
BLOCKS = {2: 18, 3: 20, 8: 34}


class Parsed:
    """Metadata, and tensors by name: type, shape, and bytes of a row each."""

    def __init__(self, content):
        self.content, self.at = content, 4
        assert content[:4] == b"GGUF"
        version, count, keys = self.take("IQQ")
        assert version == 3
        self.metadata = {self.string(): self.value(self.take("I")[0]) for _ in range(keys)}
        infos = []
        for _ in range(count):
            name, (rank,) = self.string(), self.take("I")
            infos.append((name, self.take(f"{rank}Q")[::-1], *self.take("I"), *self.take("Q")))
        start = -(-self.at // 32) * 32
        self.tensors = {}
        for name, shape, kind, offset in infos:
            assert offset % 32 == 0
            itemsize = FLOATS[kind].itemsize if kind in FLOATS else BLOCKS[kind] / 32
            size = int(torch.Size(shape).numel() * itemsize)
            data = torch.frombuffer(bytearray(content[start + offset : start + offset + size]), dtype=torch.uint8)
            self.tensors[name] = (kind, shape, data.view(shape[0], -1))
        assert len(content) % 32 == 0

    def take(self, form):
        values = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def string(self):
        (length,) = self.take("Q")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, count = self.take("IQ")
            return [self.value(inner) for _ in range(count)]
        return self.take(NUMBERS[kind])[0]

    def values(self, name):
        kind, shape, data = self.tensors[name]
        if kind in FLOATS:
            return data.view(FLOATS[kind]).view(shape).float()
        blocks = data.view(shape[0], -1, BLOCKS[kind])
        scale = blocks[..., :2].contiguous().view(torch.float16).float()
        if kind == 8:
            return (blocks[..., 2:].view(torch.int8).float() * scale).flatten(1)
        codes = blocks[..., 4 if kind == 3 else 2 :]
        codes = torch.cat([codes & 15, codes >> 4], dim=-1).float()
        if kind == 3:
            return (codes * scale + blocks[..., 2:4].contiguous().view(torch.float16).float()).flatten(1)
        return ((codes - 8) * scale).flatten(1)


def with_half_scales(model, zero_point=None):
    """Give the weights scales that float16 holds, and the same zero point if given."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WeightOnlyQuantizedLinear):
            qw = module.quantized_weight()
            zeros = None if qw.zero_points is None else qw.zero_points.fill_(zero_point)
            scales = qw.scales.half().float() if zeros is None else torch.full_like(qw.scales, 2.0**-6)
            qw = QuantizedWeight(qw.codes, scales, zeros, qw.g_idx, qw.scheme, qw.shape)
            model.set_submodule(name, type(module).from_quantized_weight(qw, module.float_bias))
    return model


def make(name, dtype=WoqWeightDtype.INT4, scheme=WoqWeightQScheme.SYMMETRIC, group_size=32):
    torch.manual_seed(0)
    model_class, options = MODELS[name]
    model = model_class(model_class.config_class(**SIZES, **options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, weight_qscheme=scheme, group_size=group_size)
    if name == "qwen3":
        mapping.set_module_name("lm_head", None)
    return with_half_scales(ipex.llm.optimize(model, quantization_config=mapping), 5)


def export(model, folder, tokenizer=None):
    ipex.llm.export(model, folder / "out", "gguf", tokenizer)
    assert [file.name for file in (folder / "out").iterdir()] == ["model.gguf"]
    return Parsed((folder / "out" / "model.gguf").read_bytes())


def interleaved(values, heads):
    """Halves of heads as pairs of rows, one row after the other."""
    size = len(values) // heads
    rows = [
        values[head * size + half * size // 2 + i] for head in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "scheme", "group_size", "kind"),
    [
        (WoqWeightDtype.INT4, WoqWeightQScheme.SYMMETRIC, 32, 2),
        (WoqWeightDtype.INT4, WoqWeightQScheme.SYMMETRIC, -1, 2),
        (WoqWeightDtype.INT4, WoqWeightQScheme.ASYMMETRIC, 64, 3),
        (WoqWeightDtype.INT8, WoqWeightQScheme.SYMMETRIC, 32, 8),
        (WoqWeightDtype.INT8, WoqWeightQScheme.SYMMETRIC, -1, 8),
    ],
)
def test_values(name, dtype, scheme, group_size, kind, tmp_path):
    model = make(name, dtype, scheme, group_size)
    file = export(model, tmp_path)
    layer = model.model.layers[1]
    pairs = name in ("llama", "mistral")
    for part, module, heads in (
        ("attn_q", layer.self_attn.q_proj, 4),
        ("attn_k", layer.self_attn.k_proj, 2),
        ("attn_v", layer.self_attn.v_proj, None),
        ("attn_output", layer.self_attn.o_proj, None),
        ("ffn_down", layer.mlp.down_proj, None),
    ):
        expected, bias = affine.dequantize(module.quantized_weight(), torch.float32), module.float_bias
        if pairs and heads:
            expected, bias = interleaved(expected, heads), None if bias is None else interleaved(bias, heads)
        assert file.tensors[f"blk.1.{part}.weight"][0] == kind
        assert torch.equal(file.values(f"blk.1.{part}.weight"), expected)
        assert (f"blk.1.{part}.bias" in file.tensors) == (bias is not None)
        if bias is not None:
            assert torch.equal(file.values(f"blk.1.{part}.bias").flatten(), bias)
    assert torch.equal(file.values("token_embd.weight"), model.model.embed_tokens.weight)
    assert torch.equal(file.values("output_norm.weight").flatten(), model.model.norm.weight)
    assert ("output.weight" in file.tensors) == (name != "qwen3")
    assert file.metadata["general.file_type"] == {2: 2, 3: 3, 8: 7}[kind]


def test_metadata(tmp_path):
    metadata = export(make("qwen3"), tmp_path).metadata
    expected = {
        "vocab_size": 96,
        "context_length": 32768,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
    }
    assert metadata["general.architecture"] == "qwen3"
    assert {key: metadata[f"qwen3.{key}"] for key in expected} == expected
    assert metadata["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert metadata["tokenizer.ggml.model"] == "none"


def tokenizer(pre_tokenizer, **options):
    vocabulary = {token: number for number, token in enumerate(("a", "b", "ab", "Ġ"))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], **options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template="{{ x }}")


def test_the_tokenizer(tmp_path):
    metadata = export(make("llama"), tmp_path, tokenizer(pre_tokenizers.ByteLevel(use_regex=True))).metadata
    prefix = "tokenizer.ggml."
    assert (metadata[f"{prefix}model"], metadata[f"{prefix}pre"]) == ("gpt2", "gpt-2")
    assert metadata[f"{prefix}tokens"][:6] == ["a", "b", "ab", "Ġ", "<end>", "[PAD5]"]
    assert len(metadata[f"{prefix}tokens"]) == 96
    assert metadata[f"{prefix}token_type"][:6] == [1, 1, 1, 1, 3, 4]
    assert metadata[f"{prefix}merges"] == ["a b"]
    assert metadata[f"{prefix}eos_token_id"] == 4
    assert f"{prefix}bos_token_id" not in metadata
    assert metadata["tokenizer.chat_template"] == "{{ x }}"


def test_sliding_windows_are_not_written(tmp_path):
    model = make("mistral")
    model.config.sliding_window = 16
    with pytest.raises(ValueError, match="sliding_window: GGUF is written of models without it, got 16"):
        ipex.llm.export(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: tokenizer(pre_tokenizers.Whitespace()), "llama.cpp has no name for how it divides texts"),
        (lambda: tokenizer(pre_tokenizers.ByteLevel(), byte_fallback=True), "GGUF is written with byte-level BPE"),
    ],
)
def test_tokenizers_that_are_not_written(given, message, tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer: {message}"):
        ipex.llm.export(make("llama"), tmp_path / "out", "gguf", given())
    assert not (tmp_path / "out").exists()


def test_what_no_block_holds(tmp_path, llama, make_model):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32)
    model = ipex.llm.optimize(llama, quantization_config=mapping)
    with pytest.raises(ValueError, match=r"self_attn.q_proj: its scales are not float16, GGUF's are; quantize it by a"):
        ipex.llm.export(model, tmp_path / "out", "gguf")
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=16)
    model = with_half_scales(ipex.llm.optimize(llama, quantization_config=mapping), 8)
    with pytest.raises(ValueError, match=r"GGUF has blocks of 32 input features, its groups have 16"):
        ipex.llm.export(model, tmp_path / "out", "gguf")
    model = ipex.llm.optimize(make_model("opt"), quantization_config=mapping)
    with pytest.raises(ValueError, match=r"format: GGUF is written of llama, mistral, qwen2, qwen3 models, got a opt"):
        ipex.llm.export(model, tmp_path / "out", "gguf")
