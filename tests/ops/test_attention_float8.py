"""Attention over FP8 (e5m2) caches and writes to them against their plain-torch definition, at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_attention as reference

from .test_attention import DTYPES, case, normal
from .test_attention_fused import close

FP8 = torch.float8_e5m2
SCALES = [None, torch.tensor([0.75])]


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of FP8 tensors, bit by bit but for the bits of NaN."""
    return torch.equal(one.float().nan_to_num(1.5), other.float().nan_to_num(1.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_number_is_rounded_as_torch_does(dtype, scale) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16)
    key = {
        torch.float16: numbers.view(torch.float16),
        torch.bfloat16: numbers.view(torch.bfloat16),
        torch.float32: torch.cat(((numbers.int() << 16), (numbers.int() << 16) + 0x7FFF)).view(torch.float32),
    }[dtype].view(1, 1, -1, 32)
    cache, expected = torch.zeros(2, *key.shape).to(FP8)
    ops.write_cache(key, cache, scale, 0)
    reference.write_cache(key, expected, scale, 0)
    assert equal(cache, expected)
    halves = torch.tensor(
        [57344.0, 61439.0, 61440.0, 65536.0, 2.0**-17, 2.0**-16 * 1.5, 1.125, 1.375, -3e38, torch.inf]
    )
    cache = torch.zeros(1, 1, 1, 10).to(FP8)
    ops.write_cache(halves.view_as(cache), cache, None, 0)
    by_hand = [57344.0, 57344.0, torch.inf, torch.inf, 0.0, 2.0**-15, 1.0, 1.5, -torch.inf, torch.inf]
    assert cache.flatten().float().tolist() == by_hand


@settings(max_examples=80, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 4, 7]),
    queries=st.sampled_from([1, 2, 8, 9, 40]),
    tokens=st.sampled_from([1, 16, 65, 200]),
    dims=st.sampled_from([(64, 64), (128, 128), (1, 1), (33, 7), (24, 130)]),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from([{}, {"causal": True}, {"window": 5}, {"softcap": 3.0}, {"scale": -0.3}]),
    scales=st.tuples(*[st.sampled_from(SCALES)] * 2),
)
def test_close_to_the_definition(kv_heads, group, queries, tokens, dims, dtype, options, scales) -> None:
    query, key, value = case(2, kv_heads, group, queries, tokens, dims, dtype)
    options = {"scale": dims[0] ** -0.5, "key_scales": scales[0], "value_scales": scales[1], **options}
    arguments = query, key.to(FP8), value.to(FP8)
    close(ops.attention(*arguments, **options), reference.attention(*arguments, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 8, 100])
def test_long_contexts_are_divided(dtype, queries) -> None:
    query, key, value = case(1, 2, 4, queries, 2600, (64, 48), dtype)
    options = {"scale": 0.125, "causal": True, "key_scales": SCALES[1], "value_scales": SCALES[1]}
    arguments = query, key.to(FP8), value.to(FP8)
    close(ops.attention(*arguments, **options), reference.attention(*arguments, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("queries", [[1, 1, 1], [3, 0, 30]])
def test_paged_caches_are_written_and_read(dtype, scale, queries) -> None:
    lengths, block = [5, 17, 33], 8
    tables = torch.randperm(15, generator=torch.Generator().manual_seed(0)).view(3, 5).int()
    slots = torch.cat([table[torch.arange(n) // block] * block + torch.arange(n) % block
                       for table, n in zip(tables.long(), lengths, strict=True)])  # fmt: skip
    slots[2] = -1
    key, value = (normal(sum(lengths), 2, 24, dtype=dtype, seed=seed) for seed in (1, 2))
    got, expected = ([torch.ones(15, 2, block, 24).to(FP8) for _ in range(2)] for _ in range(2))
    ops.write_paged_cache(key, value, *got, slots, scale, scale)
    reference.write_paged_cache(key, value, *expected, slots, scale, scale)
    assert all(equal(*pair) for pair in zip(got, expected, strict=True))
    starts = torch.tensor([0, *queries]).cumsum(0)
    arguments = normal(sum(queries), 4, 24, dtype=dtype), *got, tables, torch.tensor(lengths), starts
    options = {"scale": 0.2, "key_scales": scale, "value_scales": scale}
    close(ops.paged_attention(*arguments, **options), reference.paged_attention(*arguments, **options))


@pytest.mark.parametrize("scale", SCALES)
def test_rotation_write_and_attention_are_the_same_as_their_parts(scale) -> None:
    qkv, angles = normal(2, 3, 8 * 16, dtype=torch.bfloat16), normal(1, 3, 8)
    fused, apart = ([normal(2, 2, 20, 16, seed=seed).to(FP8) for seed in (1, 2)] for _ in range(2))
    result = ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *fused, scale, scale, start=4, scale=0.25)
    queries, keys, values = qkv.unflatten(2, (8, 16)).split((4, 2, 2), dim=2)
    queries, keys = (ops.rotary(x, angles.cos(), angles.sin()).transpose(1, 2) for x in (queries, keys))
    ops.write_cache(keys, apart[0], scale, 4)
    ops.write_cache(values.transpose(1, 2), apart[1], scale, 4)
    seen = (cache[:, :, :7] for cache in apart)
    options = {"key_scales": scale, "value_scales": scale, "causal": True, "scale": 0.25}
    assert torch.equal(result, ops.attention(queries, *seen, **options).flatten(2))
    assert all(equal(*pair) for pair in zip(fused, apart, strict=True))


QUERY, CACHE = torch.ones(2, 4, 3, 16), torch.ones(2, 2, 9, 16).to(FP8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_scales": torch.ones(2, 2, 9)}, "key_scales: expected 1 dimensions"),
        ({"value_scales": torch.ones(2)}, r"value_scales: expected one scale of a float8 cache, got \[2\]"),
        ({"value_scales": torch.ones(1).half()}, "value_scales: expected dtype Float"),
        ({"key_scales": torch.tensor([torch.inf])}, "key_scales: expected a finite product with scale"),
        ({"value": CACHE.float()}, "value: expected dtype Float8_e5m2"),
        ({"key": CACHE.to(torch.float8_e4m3fn)}, "key: expected the dtype of query, int8 or float8_e5m2"),
        ({"key_factors": torch.ones(2, 16)}, "key_factors: expected only with an int8 cache"),
    ],
)
def test_bad_argument(change, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.attention(**{"query": QUERY, "key": CACHE, "value": CACHE, "scale": 1.0, **change})


def test_bad_scale_of_a_write() -> None:
    with pytest.raises(RuntimeError, match="scales: expected one scale of a float8 cache"):
        ops.write_cache(QUERY[:, :2], CACHE.clone(), torch.ones(9), 0)


def test_opcheck() -> None:
    attention, write = torch.ops.ipex_quant.attention.default, torch.ops.ipex_quant.write_paged_cache.default
    options = (None, 0, 0.0, None)
    fake = "test_faketensor"  # the other checks multiply what they compare, which torch cannot in FP8
    arguments = QUERY, CACHE, CACHE, 0.5, True, *options, SCALES[1], SCALES[1], None
    torch.library.opcheck(attention, arguments, test_utils=fake)
    caches = CACHE.clone(), CACHE.clone()
    states = torch.ones(3, 2, 16)
    arguments = states, states, *caches, torch.ones(1), torch.ones(1), torch.tensor([3, -1, 5])
    torch.library.opcheck(write, arguments, test_utils=fake)
