"""`export` to GGUF, read by a parser of the format's description that is written here."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import ipex_quant as ipex
from ipex_quant.checkpoints import open_gguf
from ipex_quant.llm.saved.gguf_parts import model_metadata
from ipex_quant.llm.saved.gguf_tokenizer import tokenizer_metadata
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


GEMMA = {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32}
WINDOW = {"sliding_window": 8, "num_hidden_layers": 3}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {f"{part}_factor": [1.0 + number / 8 for number in range(8)] for part in ("long", "short")}
LOADED = {
    "gemma": (transformers.GemmaForCausalLM, {"num_key_value_heads": 2, "head_dim": 32}),
    "gemma2": (transformers.Gemma2ForCausalLM, GEMMA | WINDOW),
    "gemma3": (transformers.Gemma3ForCausalLM, GEMMA | WINDOW | {"num_hidden_layers": 7}),
    "phi3": (transformers.Phi3ForCausalLM, {"num_key_value_heads": 2, "pad_token_id": 0}),
    "phi3_long": (
        transformers.Phi3ForCausalLM,
        {
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10_000.0, **LONG},
        },
    ),
    "llama": (transformers.LlamaForCausalLM, {"num_key_value_heads": 2, "mlp_bias": True}),
    "llama3": (
        transformers.LlamaForCausalLM,
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}},
    ),
    "linear": (
        transformers.Qwen2ForCausalLM,
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "yarn": (
        transformers.Qwen3ForCausalLM,
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", LOADED)
def test_the_logits_come_back(name, embeddings, tmp_path):
    torch.manual_seed(0)
    model_class, options = LOADED[name]
    model = model_class(model_class.config_class(**SIZES | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    kinds = {"weight_dtype": WoqWeightDtype.INT4, "weight_qscheme": WoqWeightQScheme.SYMMETRIC, "group_size": 32}
    mapping = get_weight_only_quant_qconfig_mapping(**kinds)
    if embeddings:
        mapping.set_object_type(torch.nn.Embedding, mapping.global_qconfig)
    elif name in ("gemma", "gemma2"):
        mapping.set_module_name("lm_head", None)
    model = with_half_scales(ipex.llm.optimize(model, quantization_config=mapping))
    if embeddings:
        table = model.get_input_embeddings().table
        qw = table.quantized_weight()
        head = type(table).from_quantized_weight(replace(qw, scales=qw.scales.half().float()))
        model.get_input_embeddings().share(head)
        if model.config.tie_word_embeddings:
            model.set_submodule("lm_head", head)
    file = export(model, tmp_path)
    back = ipex.llm.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=mapping)
    ids = torch.arange(24)[None] * 7 % 96
    with torch.no_grad():
        # numbers of the metadata are float32, and what is fused in one of the models rounds otherwise
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert file.tensors["token_embd.weight"][0] == (2 if embeddings else 0)
    tied = model.config.tie_word_embeddings and (embeddings or name in ("gemma", "gemma2"))
    assert ("output.weight" in file.tensors) == (not tied)
    assert back.config.tie_word_embeddings == tied
    if name.startswith("gemma"):
        assert torch.equal(
            file.values("blk.1.attn_norm.weight").flatten(), model.model.layers[1].input_layernorm.weight + 1
        )


def test_a_head_of_its_own_that_llama_cpp_has_not(tmp_path):
    model_class, options = LOADED["gemma"]
    kinds = {"weight_dtype": WoqWeightDtype.INT4, "weight_qscheme": WoqWeightQScheme.SYMMETRIC, "group_size": 32}
    mapping = get_weight_only_quant_qconfig_mapping(**kinds)
    model = model_class(model_class.config_class(**SIZES | options)).eval()
    model = with_half_scales(ipex.llm.optimize(model, quantization_config=mapping))
    with pytest.raises(
        ValueError, match=r"^lm_head: llama.cpp has no output layer in gemma models beside the embedding"
    ):
        ipex.llm.export(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize("name", ["gguf_q5_0"])
def test_a_file_becomes_the_same_file(name, tmp_path):
    (source,) = (Path(__file__).parent / "data" / name).glob("*.gguf")
    ipex.llm.export(ipex.llm.from_pretrained(source, dtype=torch.float32), tmp_path / "out", "gguf")
    old, new = open_gguf(source).tensors, open_gguf(tmp_path / "out" / "model.gguf").tensors
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert tensor.kind == new[key].kind
        assert torch.equal(tensor.stored[...].view(torch.uint8), new[key].stored[...].view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: llama.cpp has silu in this model, got 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar: llama.cpp has 32 in this model, got 99"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping: llama.cpp has a soft cap"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping: llama.cpp has none in this model"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types: llama.cpp has 5 layers with a window"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: GGUF is written of"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: GGUF is written of"),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "yarn without .'mscale'"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(name, changes, message):
    model_class, options = LOADED[name]
    config = model_class.config_class(**SIZES | options)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        model_metadata(config)


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


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"


def sentence_piece(tokens, merges, prepend=True, **options):
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", *BYTES, *tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True, **options))
    steps = [normalizers.Prepend(SPACE)] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("prepend", [False, True])
def test_sentence_piece(prepend):
    tokens = [SPACE, "a", "b", "ab", "aba"]
    given = sentence_piece(tokens, [("a", "b"), ("ab", "a"), ("a", "ba")][:2], prepend)
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in tokenizer_metadata(given, 265).items()}
    assert (metadata["model"], metadata["pre"], metadata["add_space_prefix"]) == ("llama", "default", prepend)
    assert metadata["tokens"] == ["<unk>", "<s>", *BYTES, *tokens, "[PAD263]", "[PAD264]"]
    assert metadata["token_type"] == [2, 3, *[6] * 256, *[1] * 5, 4, 4]
    scores = dict(zip(metadata["tokens"], metadata["scores"], strict=True))
    assert scores["ab"] > scores["aba"]
    assert (metadata["bos_token_id"], metadata["unknown_token_id"]) == (1, 0)


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        (["a", "b", "ab", "ba", "aba"], [("a", "b"), ("ab", "a"), ("b", "a"), ("a", "ba")], "'aba' are apart"),
        (["a", "b", "ab"], [], "1 pairs of tokens make 'ab' without a merge"),
    ],
)
def test_merges_that_scores_do_not_tell(tokens, merges, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(sentence_piece(tokens, merges), 300)


def test_texts_that_llama_cpp_does_not_change_so():
    given = sentence_piece(["a"], [])
    given.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"llama.cpp does not do Lowercase to texts"):
        tokenizer_metadata(given, 300)


def test_sliding_windows_are_not_written(tmp_path):
    model = make("mistral")
    model.config.sliding_window = 16
    with pytest.raises(ValueError, match="sliding_window: GGUF is written of models without it, got 16"):
        ipex.llm.export(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: tokenizer(pre_tokenizers.Whitespace()), "llama.cpp has no name for how it divides texts"),
        (lambda: tokenizer(pre_tokenizers.ByteLevel(), byte_fallback=True), "GGUF is written with byte-level BPE or"),
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
    with pytest.raises(ValueError, match=r"format: GGUF is written of llama, mistral, .*, .* models, got a opt"):
        ipex.llm.export(model, tmp_path / "out", "gguf")
