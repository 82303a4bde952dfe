"""Deci models out of GGUF files, against Llamas whose missing parts give zeros."""

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.checkpoints import open_gguf
from ipex_quant.llm.gguf import gguf_config
from ipex_quant.llm.gguf.deci import DeciForCausalLM, LinearAttention
from ipex_quant.nn import QuantizedModule, WeightOnlyQuantizedLinear

HEADS, GROUPS, WIDTHS = [4, 4, 0, 4, 4], [2, 1, 0, 0, 2], [128, 64, 128, 128, 0]
"""Of layers that are whole, narrow, without attention, with a linear layer for it, and without an MLP."""


def whole_llama():
    config = transformers.LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": 2},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


def reduced(model):
    """A Llama that computes what its reduction does, and the tensors of that by the Llama's names."""
    layers = model.model.layers
    tensors = dict(model.state_dict())
    start = "model.layers"
    for part in "kv":  # both heads of layer 1 are the same
        weight = layers[1].self_attn.get_submodule(f"{part}_proj").weight
        weight[16:] = weight[:16]
        tensors[f"{start}.1.self_attn.{part}_proj.weight"] = weight[:16]
    layers[1].mlp.gate_proj.weight[64:] = 0
    for part in ("gate", "up"):
        tensors[f"{start}.1.mlp.{part}_proj.weight"] = tensors[f"{start}.1.mlp.{part}_proj.weight"][:64]
    tensors[f"{start}.1.mlp.down_proj.weight"] = tensors[f"{start}.1.mlp.down_proj.weight"][:, :64]
    layers[2].self_attn.o_proj.weight.zero_()
    layers[4].mlp.down_proj.weight.zero_()
    linear = LinearAttention(model.config)
    linear.o_proj.weight = layers[3].self_attn.o_proj.weight
    layers[3].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states @ linear.o_proj.weight.t(), None)
    gone = ("2.self_attn", "2.input_layernorm", "3.self_attn.q", "3.self_attn.k", "3.self_attn.v", "4.mlp", "4.post_")
    return model, {k: t for k, t in tensors.items() if not k.removeprefix(f"{start}.").startswith(gone)}


NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"},
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


@pytest.fixture
def deci_file(tmp_path, write_gguf, blocks_of):
    """`deci_file(tensors, quantized, ...)` writes a file; further entries replace those of the architecture."""

    def write(tensors, quantized=False, **changes):
        metadata = {
            "context_length": 128,
            "embedding_length": 64,
            "block_count": 5,
            "attention.head_count": HEADS,
            "attention.head_count_kv": GROUPS,
            "feed_forward_length": WIDTHS,
            "attention.key_length": 16,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 10_000.0,
            "rope.dimension_count": 16,
        } | changes
        written = {}
        for name, tensor in tensors.items():
            *start, own = name.removesuffix(".weight").rsplit("model.layers.", 1)
            number, _, part = own.partition(".") if start else ("", "", own)
            new = f"blk.{number}.{NAMES[part]}.weight" if start else f"{NAMES[part]}.weight"
            if new.endswith(("attn_q.weight", "attn_k.weight")):  # halves of heads become pairs
                tensor = tensor.view(-1, 2, 8, 64).transpose(1, 2).reshape(tensor.shape)
            written[new] = blocks_of(tensor)[0] if quantized and tensor.dim() > 1 else tensor
        entries = {"general.architecture": "deci", **{f"deci.{key}": value for key, value in metadata.items()}}
        return write_gguf(tmp_path / "deci.gguf", entries, written)

    return write


IDS = torch.arange(3, 15).view(2, 6)


def test_layers_that_differ(deci_file):
    model, tensors = reduced(whole_llama())
    loaded = ipex.llm.from_pretrained(deci_file(tensors), torch.float32)
    assert type(loaded) is DeciForCausalLM
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


def test_blocks_and_saving(deci_file, blocks_of, tmp_path):
    _, tensors = reduced(whole_llama())
    loaded = ipex.llm.from_pretrained(deci_file(tensors, quantized=True), torch.float32)
    layers = loaded.model.layers
    assert isinstance(layers[3].self_attn.o_proj, WeightOnlyQuantizedLinear)
    assert sum(isinstance(each, QuantizedModule) for each in loaded.modules()) == 7 + 7 + 3 + 4 + 4 + 2
    values = {name: blocks_of(t)[1] if t.dim() > 1 else t for name, t in tensors.items()}
    expected = ipex.llm.from_pretrained(deci_file(values), torch.float32)
    torch.testing.assert_close(loaded(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    ipex.llm.save(loaded, tmp_path / "saved")
    again = ipex.llm.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


@pytest.mark.filterwarnings("ignore:embeddings are in float")
def test_an_export_comes_back(deci_file, tmp_path):
    _, tensors = reduced(whole_llama())
    loaded = ipex.llm.from_pretrained(deci_file(tensors, quantized=True), torch.float32)
    ipex.llm.export(loaded, tmp_path / "out", "compressed-tensors")
    again = ipex.llm.from_pretrained(tmp_path / "out")
    assert type(again) is DeciForCausalLM
    embedded = IDS.unique()  # embeddings are in float there
    assert torch.equal(again.model.embed_tokens(embedded), loaded.model.embed_tokens(embedded))
    torch.testing.assert_close(again(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"GGUF is written of .* models, got a deci"):
        ipex.llm.export(loaded, tmp_path / "gguf", "gguf")


def test_layers_that_are_alike_are_a_llama(deci_file):
    model = whole_llama()
    same = {"attention.head_count": 4, "attention.head_count_kv": [2] * 5, "feed_forward_length": 128}
    loaded = ipex.llm.from_pretrained(deci_file(model.state_dict(), **same), torch.float32)
    assert type(loaded) is transformers.LlamaForCausalLM
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count": [4, 4, 0, 2, 4]}, r"head_count: expected one number, or 0, got \[4, 4, 0, 2, 4\]"),
        ({"attention.head_count": [4]}, r"head_count: expected a number, or one of each of 5 layers, got \[4\]"),
        ({"attention.head_count_kv": [3] * 5}, r"head_count_kv: expected a divisor of 4 heads, got 3"),
        ({"attention.head_count_kv": [0] * 5}, r"head_count: expected one number"),
        ({"feed_forward_length": [-1] * 5}, r"feed_forward_length: expected a number"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count: expected the 16 of a head, got 8"),
    ],
)
def test_what_is_absurd_is_named(deci_file, changes, message):
    with pytest.raises(ValueError, match=message):
        gguf_config(open_gguf(deci_file(whole_llama().state_dict(), **changes)))
