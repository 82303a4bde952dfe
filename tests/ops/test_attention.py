"""Attention and cache writes in this process against their plain-torch definition, at every ISA level."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_attention as reference

from .attention_oracle import assert_int8_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Probabilities times values of unit variance, in float32 or by bf16 products; then one rounding to the result's dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def case(
    batch: int, kv_heads: int, group: int, queries: int, tokens: int, dims: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(batch, kv_heads * group, queries, dims[0], dtype=dtype),
        normal(batch, kv_heads, tokens, dims[0], dtype=dtype, seed=1),
        normal(batch, kv_heads, tokens, dims[1], dtype=dtype, seed=2),
    )


def check(query, key, value, error: float = 1e-5, **options) -> torch.Tensor:
    """Of a float cache and of its int8 form, whose weights have that relative error. Returns the former's result."""
    options.setdefault("scale", query.shape[-1] ** -0.5)
    result = ops.attention(query, key, value, **options)
    assert result.is_contiguous()
    assert result.dtype == query.dtype
    expected = reference.attention(query, key, value, **options)
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    (key, key_scales), (value, value_scales) = reference.quantize_token(key), reference.quantize_token(value)
    options |= {"key_scales": key_scales, "value_scales": value_scales}
    int8 = ops.attention(query, key, value, **options)
    assert_int8_close(int8, reference.attention, query, key, value, error=error, **options)
    return result


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4, 7]),
    queries=st.sampled_from([1, 2, 5, 8, 9, 40]),
    tokens=st.sampled_from([1, 3, 16, 63, 65, 129, 200]),
    dims=st.sampled_from([(16, 16), (64, 64), (128, 128), (80, 80), (1, 1), (33, 7), (24, 130)]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 5, 70]),
    softcap=st.sampled_from([0.0, 0.0, 3.0]),
    alibi=st.booleans(),
    mask=st.sampled_from([None, None, "bool", "float", "dtype"]),
)
def test_close_to_the_definition(
    batch, kv_heads, group, queries, tokens, dims, dtype, causal, window, softcap, alibi, mask
) -> None:
    query, key, value = case(batch, kv_heads, group, queries, tokens, dims, dtype)
    if mask == "bool":
        mask = torch.rand(batch, 1, queries, tokens, generator=generator(3)) < 0.7
    elif mask is not None:
        kind = torch.float32 if mask == "float" else dtype
        mask = normal(batch, kv_heads * group, 1, tokens, seed=3).to(kind)
    slopes = torch.rand(kv_heads * group, generator=generator(4)) / 8 if alibi else None
    check(query, key, value, causal=causal, window=window, softcap=softcap, alibi=slopes, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 8, 100, 300])
def test_long_contexts_are_divided(dtype: torch.dtype, queries: int) -> None:
    for options in ({}, {"causal": True}, {"causal": True, "window": 1500}):
        check(*case(1, 2, 4, queries, 2600, (64, 48), dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 3, 12, 100])
@pytest.mark.parametrize("tokens", [100, 129, 500, 1433])
def test_bounds_of_an_int8_cache_are_tight(dtype: torch.dtype, queries: int, tokens: int) -> None:
    query, *cache = case(1, 2, 2, queries, tokens, (64, 64), dtype)
    (key, key_scales), (value, value_scales) = map(reference.quantize_token, cache)
    scales = {"key_scales": key_scales, "value_scales": value_scales, "scale": 0.125}

    def accepted(result: torch.Tensor) -> bool:
        try:
            assert_int8_close(result, reference.attention, query, key, value, **scales)
        except AssertionError:
            return False
        return True

    result = ops.attention(query, key, value, **scales)
    assert accepted(result)
    assert not accepted(result * 1.1)
    shorter = {name: x[:, :, :-1] for name, x in scales.items() if name != "scale"}
    assert not accepted(ops.attention(query, key[:, :, :-1], value[:, :, :-1], scale=0.125, **shorter))
    doubled = value_scales.clone()
    doubled[:, :, tokens // 2] *= 2
    assert not accepted(ops.attention(query, key, value, **scales | {"value_scales": doubled}))
    floats = ops.attention(query, *cache, scale=0.125)
    assert not accepted(floats)


def test_blocks_of_probabilities() -> None:
    """By hand, as csrc/host/attention_call.cpp divides tokens."""
    assert [reference.block_tokens(rows) for rows in (1, 8, 9, 16, 17, 500)] == [128, 128, 64, 64, 128, 128]
    numbers = reference.block_numbers(1, 200, 2, 0, 64)
    assert numbers.shape == (2, 1, 200)
    assert (numbers == torch.tensor([0] * 64 + [1] * 64 + [2] * 64 + [3] * 8)).all()
    numbers = reference.block_numbers(1, 200, 1, 150, 128)  # it sees tokens 50 to 199
    assert numbers.flatten().tolist() == [0] * 178 + [1] * 22
    numbers = reference.block_numbers(60, 200, 2, 70, 64)  # 120 rows: two tasks, of queries 0 to 29, which see ...
    assert numbers[1, :30].eq(torch.tensor([0] * (71 + 64) + [1] * 64 + [2])).all()  # ... tokens 71 on
    assert numbers[0, 30:].eq(torch.tensor([0] * (101 + 64) + [1] * 35)).all()


def test_gradients_of_the_definition_ignore_the_rounding_of_probabilities() -> None:
    query, *cache = case(1, 2, 2, 3, 150, (16, 16), torch.float32)
    (key, key_scales), (value, value_scales) = map(reference.quantize_token, cache)
    mask, grads = torch.zeros(1, 1, 3, 150, requires_grad=True), []
    for rounding in (torch.round, lambda codes: codes):
        options = {"scale": 0.25, "mask": mask, "key_scales": key_scales, "value_scales": value_scales}
        reference.attention(query, key, value, rounding=rounding, **options).sum().backward()
        grads.append(mask.grad)
        mask.grad = None
    assert grads[0].any()
    assert torch.equal(*grads)


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 4]),
    queries=st.sampled_from([1, 9, 40]),
    tokens=st.sampled_from([1, 65, 200]),
    dim=st.sampled_from([16, 1, 33, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_channels_of_an_int8_cache_are_divided_by_factors(kv_heads, group, queries, tokens, dim, dtype) -> None:
    query, key, value = case(2, kv_heads, group, queries, tokens, (dim, dim), dtype)
    factors = 2.0 ** torch.randint(-3, 8, (kv_heads, dim), generator=generator(5))
    key = (key.float() * factors[:, None]).to(dtype)
    query = (query.unflatten(1, (kv_heads, group)).float() / factors[:, None, None]).flatten(1, 2).to(dtype)
    written = []
    for write in (ops.write_cache, reference.write_cache):
        cache, scales = torch.zeros(key.shape, dtype=torch.int8), torch.zeros(key.shape[:3])
        write(key, cache, scales, 0, factors)
        written.append((cache, scales))
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))
    codes, value_scales = reference.quantize_token(value)
    options = {"scale": dim**-0.5, "key_scales": scales, "value_scales": value_scales, "key_factors": factors}
    result = ops.attention(query, cache, codes, **options)
    assert_int8_close(result, reference.attention, query, cache, codes, **options)
    floats = ops.attention(query, key, value, scale=dim**-0.5)  # as if no channel were larger than another
    torch.testing.assert_close(result, floats, rtol=0.05, atol=0.08)


@pytest.mark.parametrize("queries", [4, 40, 200])
def test_the_largest_window_is_no_window(queries: int) -> None:
    for tokens in (2, queries, 2 * queries):
        query, key, value = case(1, 2, 1, queries, tokens, (8, 8), torch.float32)
        wide = ops.attention(query, key, value, scale=1.0, causal=True, window=2**63 - 1)
        assert torch.equal(wide, ops.attention(query, key, value, scale=1.0, causal=True))


@pytest.mark.parametrize("shape", [(2**40, 1, 0, 8), (1, 2**40, 0, 8)])
def test_nothing_to_attend_takes_no_time_whatever_the_other_sizes(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    assert ops.attention(empty, empty, empty, scale=1.0).numel() == 0
    heads = (2**64 - 1) // 3
    key, value = (torch.zeros(0).as_strided((0, heads, dim), (0, 0, 1)) for dim in (1, 2))
    caches = (torch.zeros(0).as_strided((0, heads, 1, dim), (0, 0, 0, 1)) for dim in (1, 2))
    ops.write_paged_cache(key, value, *caches, torch.empty(0, dtype=torch.int64))


def test_strides_of_caches_and_projections() -> None:
    """Nothing needs to be contiguous: here are a transposed query and views of larger buffers."""
    query = normal(2, 9, 4, 32).transpose(1, 2)
    cache = normal(2, 2, 100, 96, seed=1)
    key, value = cache[:, :, 3:53, 5:37], cache[:, :, 50:100, 40:]
    check(query, key, value)
    every_second = normal(2, 4, 9, 64)[..., ::2]
    check(every_second, key, value)
    mask = torch.rand(50, 9, 2, 1) < 0.5
    check(query, key, value, mask=mask.permute(2, 3, 1, 0))
    check(query, key, value, mask=torch.rand(1, 4, 9, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_say_where_tokens_are(dtype: torch.dtype) -> None:
    query, key, value = case(4, 2, 3, 1, 75, (32, 32), dtype)
    for source in (key, key[:2]):
        rows = torch.randint(0, len(source), (4, 75), generator=generator(5), dtype=torch.int32)
        result = check(query, source, value[: len(source)], rows=rows)
        gathered = [x[: len(source)].transpose(1, 2)[rows, torch.arange(75)].transpose(1, 2) for x in (key, value)]
        assert torch.equal(result, ops.attention(query, *gathered, scale=32**-0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_sees_nothing_gets_zero(dtype: torch.dtype, threads: int, request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    query, key, value = case(1, 1, 2, 5, 3, (16, 16), dtype)
    result = check(query, key, value, causal=True)  # the first two queries are before the first token
    assert not result[:, :2].any()
    assert result[:, 2:].all()
    mask = torch.ones(1, 1, 5, 3, dtype=torch.bool)
    mask[:, :, 1] = False
    assert not check(query, key, value, mask=mask)[:, 1].any()
    assert not ops.attention(query, key[:, :, :0], value[:, :, :0], scale=1.0).any()
    assert ops.attention(query[:, :, :0], key, value, scale=1.0).shape == (1, 0, 2, 16)
    assert ops.attention(query[:0], key[:0], value[:0], scale=1.0).shape == (0, 5, 2, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_may_hold_the_lowest_float(dtype: torch.dtype) -> None:
    query, key, value = case(2, 1, 2, 6, 40, (16, 16), dtype)
    mask = torch.zeros(2, 1, 6, 40, dtype=dtype)
    mask[1, ..., :17] = torch.finfo(dtype).min
    result = check(query, key, value, mask=mask)
    alone = ops.attention(query[1:], key[1:, :, 17:], value[1:, :, 17:], scale=0.25)
    torch.testing.assert_close(result[1:], alone, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e38])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_masked_by_the_lowest_float_alone_gets_the_mean(lowest: float, causal: bool) -> None:
    """As the rows of the padding get it from torch, with the masks that transformers makes."""
    query, key, value = case(2, 2, 2, 12, 12, (16, 16), torch.float32)
    mask = torch.zeros(2, 1, 12, 12)
    mask[1, ..., :5] = lowest  # queries 0 to 4 see nothing else, if they look back only
    if not causal:
        mask[1, :, :5] = lowest
    result = check(query, key, value, mask=mask, causal=causal)
    if causal:
        torch.testing.assert_close(result[1, 0], value[1, :, 0].repeat_interleave(2, 0), rtol=1e-5, atol=1e-5)
        mask = mask + torch.full((12, 12), -torch.inf).triu(1)
    torch_result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(result, torch_result.transpose(1, 2), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_a_soft_cap_costs_no_precision_in_float32(softcap: float) -> None:
    """Scores of unit variance lie on both sides of where tanh changes its formula."""
    query, key, value = case(2, 2, 2, 40, 200, (64, 64), torch.float32)
    options = {"scale": 0.125, "softcap": softcap}
    error = ops.attention(query, key, value, **options).double() - reference.attention(
        query.double(), key, value, **options
    )
    assert error.abs().max() < 6e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_sequence_and_head(dtype: torch.dtype, softcap: float, value: float) -> None:
    for which in range(3):
        tensors = list(case(2, 2, 2, 3, 20, (16, 16), dtype))
        tensors[which][1, 1, 2, 3] = value
        clean = ops.attention(*case(2, 2, 2, 3, 20, (16, 16), dtype), scale=0.25, softcap=softcap)
        result = ops.attention(*tensors, scale=0.25, softcap=softcap)
        touched = (result != clean).nonzero()
        heads = {1} if which == 0 else {2, 3}
        assert set(touched[:, 0].tolist()) == {1}
        assert set(touched[:, 2].tolist()) <= heads
        if value != value:
            assert result[1].isnan().any()


def test_nan_of_an_int8_cache() -> None:
    query, key, value = case(2, 2, 2, 1, 20, (16, 16), torch.float32)
    for which in range(2):
        pairs = [reference.quantize_token(key), reference.quantize_token(value)]
        pairs[which][1][1, 1, 4] = math.nan
        (keys, key_scales), (values, value_scales) = pairs
        result = ops.attention(query, keys, values, scale=0.25, key_scales=key_scales, value_scales=value_scales)
        assert result[1, :, 2:].isnan().all()
        assert result[:, :, :2].isfinite().all()
        assert result[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 60])
def test_result_depends_neither_on_the_threads_nor_on_the_batch(dtype: torch.dtype, queries: int) -> None:
    query, key, value = case(3, 2, 2, queries, 1300, (32, 32), dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.attention(query, key, value, scale=0.2, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][1:2], ops.attention(query[1:2], key[1:2], value[1:2], scale=0.2, causal=True))


def test_large_scores_do_not_overflow() -> None:
    for dtype in DTYPES:
        query, key, value = case(1, 1, 1, 2, 40, (64, 64), dtype)
        check(query * 30, key * 30, value, error=1e-2)  # scores near 7000, of which float32 has three decimals
        check(query, key, value, scale=-0.3)
        check(query, key, value, scale=0.0)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.sampled_from([1, 7, 16, 33, 64, 130])),
    start=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
)
def test_write_cache(shape, start, dtype, int8) -> None:
    batch, heads, tokens, dim = shape
    key = normal(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    key[..., :1, :1] = 0.0
    cache = torch.full((batch, heads, 9, dim + 3), 3).to(torch.int8 if int8 else dtype)
    scales = torch.full((batch, heads, 9), 7.0) if int8 else None
    expected, expected_scales = cache.clone(), scales.clone() if int8 else None
    ops.write_cache(key, cache[..., 1:-2], scales, start)
    reference.write_cache(key, expected[..., 1:-2], expected_scales, start)
    assert torch.equal(cache, expected)
    assert not int8 or torch.equal(scales, expected_scales)


def test_int8_codes_of_zero_and_of_nan() -> None:
    key = torch.zeros(1, 1, 2, 20)
    key[..., 1, 3] = math.nan
    cache, scales = torch.ones(1, 1, 2, 20, dtype=torch.int8), torch.ones(1, 1, 2)
    ops.write_cache(key, cache, scales, 0)
    assert not cache[:, :, 0].any()
    assert scales[0, 0, 0] == 0
    assert scales[0, 0, 1].isnan()


def test_opcheck() -> None:
    query, key, value = case(2, 2, 2, 3, 9, (16, 8), torch.bfloat16)
    key8, scales = reference.quantize_token(key)
    rows = torch.zeros(2, 9, dtype=torch.int32)
    none = [None] * 4
    attention = torch.ops.ipex_quant.attention.default
    torch.library.opcheck(attention, (query, key, value, 0.5, True, None, 0, 0.0, *none))
    torch.library.opcheck(attention, (query, key8, key8, 0.5, False, None, 3, 1.0, torch.ones(4), scales, scales, rows))
    write = torch.ops.ipex_quant.write_cache.default
    torch.library.opcheck(write, (key, torch.zeros(2, 2, 20, 16, dtype=torch.bfloat16), None, 4))
    torch.library.opcheck(write, (key, torch.zeros(2, 2, 20, 16, dtype=torch.int8), torch.zeros(2, 2, 20), 4))


def test_compile_without_graph_break() -> None:
    cache = torch.zeros(1, 2, 64, 16)

    def run(query: torch.Tensor, key: torch.Tensor, start: int) -> torch.Tensor:
        ops.write_cache(key, cache, None, start)
        seen = cache[:, :, : start + key.shape[2]]
        return ops.attention(query * 2, seen, seen, scale=0.25, causal=True) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for queries, start in ((5, 0), (1, 5), (3, 6)):
        query, key = normal(1, 4, queries, 16), normal(1, 2, queries, 16, seed=queries)
        assert torch.equal(compiled(query, key, start), run(query, key, start))
