"""Attention of code that transformers lacks; whole models of such code are in tests/llm/own_code."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.llm.decoder.own_attention import convention_of, fuse_attention
from ipex_quant.nn.fused_forward import restore_forwards


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


class OwnAttention(nn.Module):
    """Separate projections ``[B, L, K]``; two query heads share each head of keys and values."""

    def __init__(self, joined=False, grouped=False, window=0, factor=1.0, axis=2, rotary=None):
        super().__init__()
        self.rotary_emb = rotary
        self.num_heads, self.groups, self.head_dim = 4, 2, 8
        self.grouped, self.window, self.factor, self.axis = grouped, window, factor, axis
        if joined:
            self.qkv = nn.Linear(32, 64)
        else:
            self.wq, self.wk, self.wv = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.wo = nn.Linear(32, 32)

    def forward(self, x, attention_mask=None, layer_past=None, use_cache=True, head_mask=None, position_ids=None):
        heads = self.heads(x)
        if self.rotary_emb is not None:
            past = 0 if layer_past is None else layer_past[0].shape[self.axis]
            tables = self.rotary_emb(heads[2].transpose(1, 2), seq_len=past + x.shape[1])
            cos, sin = (table[position_ids][:, :, None] for table in tables)
            heads[:2] = [self.rotated(each, cos, sin) for each in heads[:2]]
        if self.axis == 2:
            heads = [each.transpose(1, 2) for each in heads]
        query, key, value = heads
        if layer_past is not None:
            key, value = (torch.cat(pair, dim=self.axis) for pair in zip(layer_past, (key, value), strict=True))
        present = (key, value) if use_cache else None
        if self.axis == 1:
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        key, value = (each.repeat_interleave(2, dim=1) for each in (key, value))
        scores = query @ key.transpose(2, 3) / self.head_dim**0.5 * self.factor
        queries, keys = scores.shape[2:]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if self.window:
            seen = seen.triu(keys - queries - self.window + 1)
        scores = scores.masked_fill(~seen, float("-inf")) if attention_mask is None else scores + attention_mask
        attended = (F.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
        return self.wo(attended), present

    def rotated(self, x, cos, sin):
        size = cos.shape[-1]
        first, second = x[..., :size].chunk(2, dim=-1)
        turned = x[..., :size] * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, x[..., size:]), dim=-1)

    def heads(self, x):
        if hasattr(self, "wq"):
            return [each(x).unflatten(-1, (-1, self.head_dim)) for each in (self.wq, self.wk, self.wv)]
        joined = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        if not self.grouped:
            return list(joined.split((4, 2, 2), dim=2))
        groups = joined.unflatten(2, (2, 4))
        return [groups[:, :, :, :2].flatten(2, 3), groups[:, :, :, 2], groups[:, :, :, 3]]


class RotaryEmbedding(nn.Module):
    """Its frequencies depend on the length, as some do."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("inv_freq", 100 ** (-torch.arange(0, size, 2) / size), persistent=False)
        self.longest = 0

    def forward(self, x, seq_len):
        self.longest = max(seq_len, self.longest)
        turns = torch.outer(torch.arange(seq_len), self.inv_freq / seq_len).repeat(1, 2)
        return turns.cos().to(x.dtype), turns.sin().to(x.dtype)


KNOWN = [{}, {"axis": 1}, {"joined": True}, {"joined": True, "grouped": True, "axis": 1}]


def pair(**options):
    """An attention module, and a copy of it that attends natively."""
    torch.manual_seed(0)
    stock = OwnAttention(**options).eval()
    native = nn.ModuleList([copy.deepcopy(stock)])
    assert fuse_attention(native) == ["0"]
    return stock, native[0]


@pytest.mark.parametrize("size", [4, 8])
def test_the_module_of_angles_is_called_as_before(size):
    stock, native = pair(rotary=RotaryEmbedding(size))
    assert native.rotary_emb.longest == 0  # trials use a copy
    pasts = [None, None]
    for length in (5, 1, 1):
        x, positions = torch.randn(2, length, 32), torch.randint(5, (2, length))
        (expected, pasts[0]), (found, pasts[1]) = (
            module(x, layer_past=past, position_ids=positions)
            for module, past in zip((stock, native), pasts, strict=True)
        )
        close(found, expected)
        close(pasts[1], pasts[0])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", KNOWN)
def test_a_prompt_and_tokens_after_it(options):
    stock, native = pair(**options)
    pasts = [None, None]
    for length in (5, 1, 1):
        x = torch.randn(2, length, 32)
        (expected, pasts[0]), (found, pasts[1]) = stock(x, layer_past=pasts[0]), native(x, layer_past=pasts[1])
        close(found, expected)
        close(pasts[1], pasts[0])
    mask = torch.randn(2, 1, 3, 10)
    x = torch.randn(2, 3, 32)
    close(native(x, mask, pasts[1]), stock(x, mask, pasts[0]))
    close(native(x, layer_past=pasts[1]), stock(x, layer_past=pasts[0]))  # its own code: several tokens without a mask
    assert native(x, use_cache=False)[1] is None


def test_a_past_continues_in_place_once_and_serves_again():
    stock, native = pair()
    x, steps = torch.randn(2, 5, 32), torch.randn(3, 2, 1, 32)
    past, expected = native(x)[1], stock(x)[1]
    presents = [native(step, layer_past=past)[1] for step in steps]
    assert presents[0][0].data_ptr() == past[0].data_ptr()
    assert presents[1][0].data_ptr() != past[0].data_ptr()
    for step, present in zip(steps, presents, strict=True):
        close(present, stock(step, layer_past=expected)[1])
    close(past, expected)


def test_sequences_may_be_reordered():
    stock, native = pair()
    x, step, order = torch.randn(2, 5, 32), torch.randn(2, 1, 32), torch.tensor([1, 1])
    pasts = [tuple(each.index_select(0, order) for each in module(x)[1]) for module in (stock, native)]
    close(native(step, layer_past=pasts[1]), stock(step, layer_past=pasts[0]))


def test_low_precision():
    stock, native = pair()
    for dtype in (torch.bfloat16, torch.float16):
        x, mask = torch.randn(2, 5, 32), torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -1e4)
        for arguments in ((), (mask[None, None],)):
            expected = stock(x, *arguments)[0]
            found = copy.deepcopy(native).to(dtype)(x.to(dtype), *(each.to(dtype) for each in arguments))[0]
            torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 30}, {"factor": 0.9}])
def test_what_computes_otherwise_is_left_alone(options):
    assert convention_of(OwnAttention(**options).eval()) is None
    assert convention_of(OwnAttention().eval()) is not None


def test_what_holds_more_than_linears_is_left_alone():
    for name, value in (("table", torch.ones(4)), ("norm", nn.LayerNorm(8))):
        module = OwnAttention().eval()
        setattr(module, name, value)
        assert convention_of(module) is None


def test_its_own_code_runs_for_other_arguments_gradients_and_hooks():
    stock, native = pair()
    x = torch.randn(2, 5, 32)
    seen = []
    own = OwnAttention.heads
    native.heads = lambda x: seen.append(1) or own(native, x)
    native(x)
    assert not seen
    native(x, head_mask=torch.ones(1))
    with torch.enable_grad():
        assert native(x)[0].requires_grad
    handle = native.wo.register_forward_hook(lambda *_: None)
    native(x)
    handle.remove()
    assert len(seen) == 3
    restore_forwards(native)
    assert torch.equal(native(x)[0], stock(x)[0])
