"""The examples of IPEX's API document, as it prints them and with its misprints mended, under IPEX's name.

Sizes are a 64th of the document's, where it has 4096, for the sake of time.
"""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from ipex_quant import data
from ipex_quant.alias import install_as_ipex, uninstall_as_ipex

LINEAR_FUSIONS = {
    "LinearSilu": lambda x: nn.functional.silu(x),
    "LinearRelu": lambda x: nn.functional.relu(x),
    "LinearGelu": lambda x: nn.functional.gelu(x),
    "LinearNewGelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "LinearSiluMul": lambda x, other: nn.functional.silu(x) * other,
    "LinearMul": lambda x, other: x * other,
    "LinearAdd": lambda x, other: x + other,
    "LinearAddAdd": lambda x, other_1, other_2: x + other_1 + other_2,
}


@pytest.fixture
def names():
    """What the examples take for granted: their imports."""
    install_as_ipex()
    import intel_extension_for_pytorch as ipex

    torch.manual_seed(0)
    yield {"torch": torch, "ipex": ipex}
    uninstall_as_ipex()


def run(example, names):
    exec(compile(example, "example", "exec"), names)


def test_optimize(names, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(64, 64).state_dict(), path)
    model = nn.Linear(64, 64)
    names |= {"PATH": path, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    run(
        """
# bfloat16 inference case.
model.load_state_dict(torch.load(PATH))
model.eval()
optimized_model = ipex.optimize(model, dtype=torch.bfloat16)
# running evaluation step.
inferred = optimized_model
# bfloat16 training case.
model.train()
optimized_model, optimized_optimizer = ipex.optimize(model, dtype=torch.bfloat16, optimizer=optimizer)
# running training step.
""",
        names,
    )
    x = torch.randn(4, 64)
    torch.testing.assert_close(names["inferred"](x.bfloat16()).float(), model(x), rtol=0.02, atol=0.02)
    before = model.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = names["optimized_model"](x).square().mean()
    loss.backward()
    names["optimized_optimizer"].step()
    torch.testing.assert_close(model.weight, before)
    assert not torch.equal(names["optimized_model"].state_dict()["weight"], before)


def test_llm_optimize(names, tmp_path):
    path = tmp_path / "weights.pt"
    model = AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    torch.save(model.state_dict(), path)
    names |= {"PATH": path, "model": model}
    run(
        """
# bfloat16 generation inference case.
model.load_state_dict(torch.load(PATH))
model.eval()
optimized_model = ipex.llm.optimize(model, dtype=torch.bfloat16)
optimized_model.generate(max_new_tokens=2, do_sample=False)
""",
        names,
    )
    assert names["optimized_model"].dtype == torch.bfloat16


@pytest.mark.parametrize("fusion", LINEAR_FUSIONS)
def test_linear_fusions(names, fusion):
    expected = LINEAR_FUSIONS[fusion]
    others = expected.__code__.co_varnames[1:]
    run(
        f"""
# module init:
linear_module = torch.nn.Linear(64, 64)
ipex_fusion = ipex.llm.modules.{fusion}(linear_module)
# module forward:
input = torch.randn(64, 64)
{"".join(f"{other} = torch.randn(64, 64){chr(10)}" for other in others)}
result = ipex_fusion({", ".join(("input", *others))})
""",
        names,
    )
    linear = names["linear_module"](names["input"])
    torch.testing.assert_close(names["result"], expected(linear, *(names[other] for other in others)))


def test_linear_2_silu_mul(names):
    run(
        """
# module init:
linear_s_module = torch.nn.Linear(64, 64)
linear_m_module = torch.nn.Linear(64, 64)
ipex_fusion = ipex.llm.modules.Linear2SiluMul(linear_s_module, linear_m_module)
# module forward:
input = torch.randn(64, 64)
result = ipex_fusion(input)
""",
        names,
    )
    x = names["input"]
    expected = nn.functional.silu(names["linear_s_module"](x)) * names["linear_m_module"](x)
    torch.testing.assert_close(names["result"], expected)


def test_rotary_embedding(names):
    run(
        """
# module init:
rope_module = ipex.llm.modules.RotaryEmbedding(2048, 64, base=10000, backbone="GPTJForCausalLM")
# forward:
query = torch.randn(1, 32, 16, 256)
plain = query.clone()
position_ids  = torch.arange(32).unsqueeze(0)
query_rotery = rope_module(query, position_ids, 16, 256, 1, 64)
""",
        names,
    )
    rotated, plain = names["query_rotery"], names["plain"]
    angles = torch.arange(32)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
    pairs = torch.view_as_complex(plain[..., :64].reshape(1, 32, 16, 32, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None])
    torch.testing.assert_close(rotated[..., :64], expected.flatten(-2), rtol=1e-4, atol=1e-4)
    assert torch.equal(rotated[..., 64:], plain[..., 64:])


def test_rms_norm(names):
    run(
        """
# module init:
rmsnorm_module = ipex.llm.modules.RMSNorm(4096)
# forward:
input = torch.randn(1, 32, 4096)
result = rmsnorm_module(input)
""",
        names,
    )
    torch.testing.assert_close(names["result"], nn.functional.rms_norm(names["input"], (4096,), eps=1e-6))


def test_fast_layer_norm(names):
    run(
        """
# module init:
layernorm = torch.nn.LayerNorm(4096)
layernorm_module = ipex.llm.modules.FastLayerNorm(4096, eps=1e-05, weight=layernorm.weight, bias=layernorm.bias)
# forward:
input = torch.randn(1, 32, 4096)
result = layernorm_module(input)
""",
        names,
    )
    torch.testing.assert_close(names["result"], names["layernorm"](names["input"]), rtol=1e-4, atol=1e-5)


def test_indirect_access_kv_cache_attention(names):
    """The document has no example of it: the first call of a decoding loop."""
    run(
        """
attention = ipex.llm.modules.IndirectAccessKVCacheAttention(text_max_length=64)
query, key, value = (torch.randn(1, 5, 2, 16) for _ in range(3))
mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
output, _, past = attention(query, key, value, 4.0, layer_past=None, attention_mask=mask)
""",
        names,
    )
    q, k, v = (names[name].transpose(1, 2) for name in ("query", "key", "value"))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(names["output"], expected)
    assert len(names["past"]) == 4


def test_varlen_attention(names):
    """The lengths are cumulative, which the document's text says and its example does not."""
    run(
        """
# module init:
varlenAttention_module = ipex.llm.modules.VarlenAttention()
# forward:
query = torch.randn(32, 16, 256)
key = torch.randn(32, 16, 256)
value = torch.randn(32, 16, 256)
out = torch.empty_like(query)
seqlen_q = torch.tensor([0, 32])
seqlen_k = torch.tensor([0, 32])
max_seqlen_q = 32
max_seqlen_k  = 32
pdropout = 0.0
softmax_scale  = 0.5
varlenAttention_module(query, key, value, out, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k, pdropout, softmax_scale)
""",
        names,
    )
    q, k, v = (names[name].transpose(0, 1) for name in ("query", "key", "value"))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    torch.testing.assert_close(names["out"], expected.transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_fast_bert(names, tmp_path):
    path = tmp_path / "weights.pt"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertModel(BertConfig(vocab_size=50, **sizes))
    torch.save(model.state_dict(), path)
    optimizer = torch.optim.AdamW(model.parameters())
    names |= {"PATH": path, "model": model, "optimizer": optimizer, "args": type("Arguments", (), {"seed": 0})}
    run(
        """
# bfloat16 inference case.
model.load_state_dict(torch.load(PATH))
model.eval()
optimized_model = ipex.fast_bert(model, dtype=torch.bfloat16)
# running evaluation step.
inferred = optimized_model
# bfloat16 training case.
model.train()
optimized_model, optimized_optimizer = ipex.fast_bert(model, dtype=torch.bfloat16,
        optimizer=optimizer, unpad=True, seed=args.seed)
# running training step.
""",
        names,
    )
    ids = torch.arange(10)[None]
    expected = model.eval()(ids).last_hidden_state
    torch.testing.assert_close(names["inferred"](ids).last_hidden_state.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = names["optimized_model"](ids).last_hidden_state.float().square().mean()
    loss.backward()
    names["optimized_optimizer"].step()
