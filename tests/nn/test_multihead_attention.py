"""Attention with projections that are layers: results, attributes, state dicts, saving, tracing, compiling."""

import copy
import io
from itertools import product

import pytest
import torch
from torch import nn

from ipex_quant.nn import SplitMultiheadAttention, WeightOnlyQuantizedLinear
from ipex_quant.nn.multihead_attention import attention_obstacle, join_attentions, named_layers, split_attentions
from ipex_quant.quantization import convert, get_weight_only_quant_qconfig_mapping, prepare

WIDTH, HEADS, QUERIES, KEYS, BATCH = 16, 4, 3, 5, 2
KINDS = [
    {},
    {"bias": False, "batch_first": True},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"kdim": 8, "vdim": 12},
    {"kdim": 8, "vdim": 12, "batch_first": True, "add_bias_kv": True},
]


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for parameter in module.parameters():  # biases are made zeros
        nn.init.uniform_(parameter, -0.4, 0.4)
    return module


def split(module):
    return split_attentions(copy.deepcopy(module), [f"{name}_proj" for name in ("q", "k", "v", "out")])


def quantized(module):
    return convert(prepare(module, get_weight_only_quant_qconfig_mapping()))


def inputs(module, batched=True):
    made = [torch.randn(BATCH, n, width) for n, width in ((QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim))]
    if not batched:
        return [x[0] for x in made]
    return made if module.batch_first else [x.transpose(0, 1) for x in made]


def masks(batched=True):
    """Masks of every kind, none of which hides all keys of a query."""
    plane = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    plane[0, 2:], plane[2, 0] = True, True
    batch = BATCH if batched else 1
    heads = torch.rand(batch * HEADS, QUERIES, KEYS) > 0.6
    heads[..., 1] = False
    padding = torch.zeros(batch, KEYS, dtype=torch.bool)
    padding[0, 3:] = True
    padding = padding if batched else padding[0]
    yield {}
    for attn_mask in (plane, heads, torch.randn(QUERIES, KEYS), torch.randn(batch * HEADS, QUERIES, KEYS)):
        kind = attn_mask.dtype
        yield {"attn_mask": attn_mask}
        yield {"attn_mask": attn_mask, "key_padding_mask": padding if kind == torch.bool else padding * -3.0}
    yield {"key_padding_mask": padding}


def assert_same(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
@torch.no_grad()
def test_results_are_torchs(options, batched):
    module = attention(**options)
    parts, packed = split(module), quantized(module)
    assert type(parts) is type(packed) is SplitMultiheadAttention
    assert not any(parameter.dim() == 2 for parameter in packed.parameters())
    weights = [{"need_weights": False}, {}, {"average_attn_weights": False}]
    for mask, need in product(masks(batched), weights):
        args = inputs(module, batched)
        expected = module(*args, **mask, **need)
        assert_same(parts(*args, **mask, **need), expected, rtol=1e-5, atol=1e-5)
        assert_same(packed(*args, **mask, **need), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_the_hint_that_a_mask_is_causal(need_weights, padded):
    module = attention(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padded:
        options["key_padding_mask"] = torch.zeros(BATCH, KEYS).index_fill(1, torch.tensor(4), float("-inf"))
    assert_same(split(module)(x, x, x, **options), module(x, x, x, **options), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="is_causal: it is a hint about attn_mask"):
        split(module)(x, x, x, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(dtype):
    module = attention(batch_first=True, add_bias_kv=True).to(dtype)
    args = [x.to(dtype) for x in inputs(module)]
    for need_weights in (True, False):
        actual, expected = (each(*args, need_weights=need_weights) for each in (quantized(module), module))
        assert actual[0].dtype == dtype
        assert_same(actual, expected, rtol=0, atol=0.02)


@torch.no_grad()
def test_autocast():
    module, x = attention(batch_first=True), torch.randn(BATCH, KEYS, WIDTH)
    mask = torch.randn(KEYS, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        actual = quantized(module)(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), module(x, x, x, attn_mask=mask)[0], rtol=0, atol=0.03)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_weights_in_training_alone(need_weights):
    module = quantized(attention(batch_first=True, dropout=0.5))
    x = torch.randn(BATCH, KEYS, WIDTH)
    first, second = (module(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert torch.equal(first, second)
    module.train()
    first, second = (module(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    mean = sum(module(x, x, x, need_weights=need_weights)[0] for _ in range(400)) / 400
    torch.testing.assert_close(mean, module.eval()(x, x, x)[0], rtol=0, atol=0.15)


def test_gradients_reach_the_inputs():
    module = attention(batch_first=True)
    expected, actual = (inputs(module) for _ in range(2))
    actual = [x.detach().clone().requires_grad_() for x in expected]
    expected = [x.requires_grad_() for x in expected]
    quantized(module)(*actual, need_weights=False)[0].sum().backward()
    module(*expected, need_weights=False)[0].sum().backward()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0.05)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_attributes_of_torchs_read_the_layers(options):
    module = attention(**options)
    for own in (split(module), quantized(module)):
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "batch_first", "dropout", "add_zero_attn"):
            assert getattr(own, name) == getattr(module, name)
        assert not own._qkv_same_embed_dim
        for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
            assert_same([getattr(own, name)], [getattr(module, name)], rtol=0, atol=0.01)
        if not module._qkv_same_embed_dim:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                torch.testing.assert_close(getattr(own, name) + 0, getattr(module, name) + 0, rtol=0, atol=0.01)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_state_dicts_have_torchs_names_until_something_is_quantized(options):
    module = attention(**options)
    own = split(module)
    assert_state(own.state_dict(), module.state_dict())
    other = split(attention(**options).requires_grad_(False))
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(module.state_dict())
    assert_state(nn.ModuleDict({"a": other}).state_dict(), nn.ModuleDict({"a": module}).state_dict())
    joined = join_attentions(own)
    assert type(joined) is nn.MultiheadAttention
    assert type(joined.out_proj) is type(module.out_proj)
    assert vars(joined).keys() == vars(module).keys()
    assert_state(joined.state_dict(), module.state_dict())
    args = inputs(module)
    assert_same(joined(*args), module(*args), rtol=0, atol=0)


def assert_state(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_quantized_state_dict_loads_into_a_quantized_module_and_no_other():
    module, other = attention(), attention()
    nn.init.zeros_(other.in_proj_weight)
    args = inputs(module)
    source, target = quantized(module), quantized(other)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(*args)[0], source(*args)[0])
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*q_proj\.codes"):
        target.load_state_dict(module.state_dict())


@torch.no_grad()
def test_saved_copied_traced_and_compiled():
    module = quantized(attention(batch_first=True))
    x = torch.randn(BATCH, KEYS, WIDTH)
    expected = module(x, x, x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(module)):
        assert_same(other(x, x, x), expected, rtol=0, atol=0)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 3:] = True
    traced = torch.jit.trace(module, (x, x, x, padding))
    longer = torch.randn(3, 7, WIDTH)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[2, 3:] = True
    assert_same(traced(longer, longer, longer, padding), module(longer, longer, longer, padding), rtol=0, atol=0)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, x, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_wrong_inputs():
    module = split(attention(batch_first=True))
    x = torch.randn(BATCH, KEYS, WIDTH)
    with pytest.raises(RuntimeError, match=r"expected 3 dimensions each, or 2 without a batch, got \[3, 2, 2\]"):
        module(x, x[0], x[0])
    with pytest.raises(RuntimeError, match="key, value: expected as many tokens"):
        module(x, x, x[:, 1:])
    with pytest.raises(RuntimeError, match=r"attn_mask: expected shape \[5, 5\] or \[8, 5, 5\], got \[1, 5\]"):
        module(x, x, x, attn_mask=torch.zeros(1, KEYS))
    with pytest.raises(RuntimeError, match=r"key_padding_mask: expected shape \[2, 5\], got \[5\]"):
        module(x, x, x, key_padding_mask=torch.zeros(KEYS))
    with pytest.raises(RuntimeError, match=r"attn_mask: expected bool or a float dtype, got torch\.int64"):
        module(x, x, x, attn_mask=torch.zeros(KEYS, KEYS, dtype=torch.int64))
    nested = torch.nested.nested_tensor(list(x))
    with pytest.raises(RuntimeError, match="expected plain tensors, got a nested one"):
        module(nested, nested, nested)


class Named(nn.MultiheadAttention):
    """Of somebody else."""


def test_only_torchs_own_class_is_split():
    assert attention_obstacle(attention()) is None
    assert attention_obstacle(nn.Linear(2, 2)) is None
    assert "Named is a class of its own" in attention_obstacle(Named(4, 2))
    assert "computed" not in str(attention_obstacle(split(attention())))
    strange = attention()
    strange.out_proj = WeightOnlyQuantizedLinear(WIDTH, WIDTH)
    assert "its out_proj is no nn.Linear" in attention_obstacle(strange)
    names = [name for name, _ in named_layers(nn.ModuleDict({"a": attention(), "b": Named(4, 2)}))]
    assert names == ["", "a", "a.q_proj", "a.k_proj", "a.v_proj", "a.out_proj", "b", "b.out_proj"]


def test_a_module_that_is_shared_stays_shared_and_keeps_its_hooks():
    shared = attention()
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    model = split_attentions(nn.ModuleDict({"a": shared, "b": shared}), ["a.q_proj"])
    assert model.a is model.b
    assert type(model.a) is SplitMultiheadAttention
    model.b(*inputs(model.b))
    assert calls == [1]
