"""Fused, paged and ragged attention in this process against their plain-torch definition, at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_attention as reference

from .test_attention import DTYPES, INT8_TOLERANCE, TOLERANCE, generator, normal


def close(result: torch.Tensor, expected: torch.Tensor, int8: bool = False) -> None:
    tolerance = max(TOLERANCE[result.dtype], INT8_TOLERANCE if int8 else 0)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def caches(shape: tuple[int, ...], dtype: torch.dtype, int8: bool) -> list[torch.Tensor | None]:
    """Key cache, value cache and their scales, filled with something."""
    if not int8:
        return [normal(*shape, dtype=dtype, seed=7), normal(*shape, dtype=dtype, seed=8), None, None]
    (key, key_scales), (value, value_scales) = (reference.quantize_token(normal(*shape, seed=i)) for i in (7, 8))
    return [key, value, key_scales, value_scales]


def copies(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.clone() for t in tensors]


def assert_written(got: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for a, b in zip(got, expected, strict=True):
        if a is not None and a.dtype == torch.int8:  # a turned key may fall on either side of a half
            assert (a.int() - b.int()).abs().max() <= 1
        elif a is not None:
            torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(4, 4), (4, 1), (6, 2)]),
    length=st.sampled_from([1, 3, 20]),
    start=st.sampled_from([0, 5, 70]),
    dim=st.sampled_from([8, 64, 80]),
    rotary=st.sampled_from([0, 4, None]),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    window=st.sampled_from([0, 7]),
    masked=st.booleans(),
)
def test_fused_rope_attention(
    batch, heads, length, start, dim, rotary, interleaved, dtype, int8, window, masked
) -> None:
    heads, kv_heads = heads
    qkv = normal(batch, length, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = normal(1, length, (dim if rotary is None else rotary) // 2, seed=3)
    mask = torch.rand(batch, 1, 1, start + length, generator=generator(4)) < 0.8 if masked else None
    options = {"start": start, "scale": dim**-0.5, "rotary_dim": rotary, "interleaved": interleaved, "window": window}
    buffers = caches((batch, kv_heads, 95, dim), dtype, int8)
    expected_buffers = copies(buffers)
    result = ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *buffers, mask=mask, **options)
    expected = reference.fused_rope_attention(qkv, angles.cos(), angles.sin(), *expected_buffers, mask=mask, **options)
    assert result.shape == (batch, length, heads * dim)
    if int8:  # one code of a turned key more or less
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    else:
        close(result, expected)
    assert_written(buffers, expected_buffers)


def test_fused_is_the_same_as_its_parts() -> None:
    qkv, angles = normal(2, 3, 8 * 16, dtype=torch.bfloat16), normal(1, 3, 8)
    for int8 in (False, True):
        fused, apart = (caches((2, 2, 20, 16), torch.bfloat16, int8) for _ in range(2))
        result = ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *fused, start=4, scale=0.25)
        states = qkv.unflatten(2, (8, 16))
        turned = ops.rotary(states[:, :, :6], angles.cos(), angles.sin()).transpose(1, 2)
        ops.write_cache(turned[:, 4:], apart[0], apart[2], 4)
        ops.write_cache(states[:, :, 6:].transpose(1, 2), apart[1], apart[3], 4)
        seen = [None if t is None else t[:, :, :7] for t in apart]
        scales = {"key_scales": seen[2], "value_scales": seen[3]}
        expected = ops.attention(turned[:, :4], seen[0], seen[1], scale=0.25, causal=True, **scales)
        assert torch.equal(result, expected.flatten(2))
        assert all(a is None or torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    new=st.lists(st.sampled_from([0, 1, 3, 30]), min_size=4, max_size=4),
    block=st.sampled_from([1, 4, 16, 32]),
    heads=st.sampled_from([(2, 2), (8, 2)]),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    options=st.sampled_from([{}, {"window": 5}, {"softcap": 4.0}, {"causal": False}]),
)
def test_paged_attention(lengths, new, block, heads, dtype, int8, options) -> None:
    heads, kv_heads = heads
    pages = caches((70, kv_heads, block, 32), dtype, int8)
    width = 60 // block + 1
    tables = torch.randint(0, 70, (len(lengths), width), generator=generator(1), dtype=torch.int32)
    starts = torch.tensor([0, *new[: len(lengths)]]).cumsum(0).int()
    query = normal(int(starts[-1]), heads, 32, dtype=dtype)
    arguments = (query, *pages[:2], tables, torch.tensor(lengths), starts)
    options = options | {"scale": 0.2, "key_scales": pages[2], "value_scales": pages[3]}
    close(ops.paged_attention(*arguments, **options), reference.paged_attention(*arguments, **options), int8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_write_paged_cache(int8: bool, dtype: torch.dtype, index: torch.dtype) -> None:
    key, value = normal(5, 6, 24, dtype=dtype)[:, ::2], normal(5, 3, 24, dtype=dtype, seed=1)
    slots = torch.tensor([3, -1, 17, 4, 11], dtype=index)
    got = caches((5, 3, 4, 24), dtype, int8)
    expected = copies(got)
    ops.write_paged_cache(key, value, got[0], got[1], slots, got[2], got[3])
    reference.write_paged_cache(key, value, expected[0], expected[1], slots, expected[2], expected[3])
    assert all(a is None or torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=4),
    dims=st.sampled_from([(16, 16), (64, 48), (7, 5)]),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from([{}, {"causal": True}, {"window": 5}, {"softcap": 4.0}, {"alibi": torch.rand(4)}]),
)
def test_varlen_attention(lengths, dims, dtype, options) -> None:
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0) for i in range(2)]
    query = normal(int(starts[0][-1]), 4, dims[0], dtype=dtype)
    key, value = (normal(int(starts[1][-1]), 2, d, dtype=dtype, seed=d) for d in dims)
    arguments = (query, key, value, starts[0].int(), starts[1])
    result = ops.varlen_attention(*arguments, scale=0.3, **options)
    close(result, reference.varlen_attention(*arguments, scale=0.3, **options))


def test_nan_stays_in_its_sequence() -> None:
    starts = torch.tensor([0, 5, 9, 12])
    query, key, value = normal(12, 2, 16), normal(12, 2, 16, seed=1), normal(12, 2, 16, seed=2)
    key[6] = torch.nan
    result = ops.varlen_attention(query, key, value, starts, starts, scale=0.25)
    assert result[5:9].isnan().all()
    assert result[:5].isfinite().all()
    assert result[9:].isfinite().all()


QKV, ANGLES = torch.ones(2, 3, 8 * 16), torch.ones(1, 3, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": QKV[..., :-1]}, r"qkv: expected \[batch, length, \(heads \+ 4\) \* 16\], got \[2, 3, 127\]"),
        ({"qkv": QKV[..., :64]}, "qkv: expected"),
        ({"qkv": QKV[:1]}, "key_cache: expected the batch size of qkv, 1, got 2"),
        ({"qkv": QKV.half()}, "key_cache: expected the dtype of what is written or int8, got Float"),
        ({"cos": ANGLES[:, :2]}, "cos: expected shape"),
        ({"rotary_dim": 18}, "rotary_dim: expected an even number up to 16, got 18"),
        ({"start": 18}, "start: 3 tokens do not fit a cache of 20 from 18"),
        ({"value_cache": torch.zeros(2, 2, 19, 16)}, "value: expected the shape of key"),
        ({"value_cache": torch.zeros(2, 3, 20, 16)}, r"value_cache: expected shape \[2, 2, 20, 16\]"),
        ({"key_scales": torch.zeros(2, 2, 20)}, "key_cache: expected scales with an int8 cache"),
        ({"mask": torch.ones(2, 1, 1, 20)}, "mask: expected a shape that broadcasts"),
    ],
)
def test_fused_errors(changes: dict, message: str) -> None:
    key_cache, value_cache = torch.zeros(2, 2, 20, 16), torch.zeros(2, 2, 20, 16)
    arguments = {"qkv": QKV, "cos": ANGLES, "sin": ANGLES, "key_cache": key_cache, "value_cache": value_cache}
    with pytest.raises(RuntimeError, match=message):
        ops.fused_rope_attention(**(arguments | {"start": 0, "scale": 1.0} | changes))
    assert not key_cache.any()
    assert not value_cache.any()


PAGES = torch.zeros(6, 2, 4, 16)
TABLES, LENGTHS = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([12, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(4, 3, 16)}, "key: expected a number of heads that divides the 3"),
        ({"query": torch.ones(4, 2, 8)}, "key: expected the head size of query, 8, got 16"),
        ({"block_tables": TABLES[:1]}, r"block_tables: expected shape \[2, blocks\]"),
        ({"block_tables": TABLES + 6}, r"block_tables: expected 0\.\.5, got 6"),
        ({"block_tables": TABLES - 1}, r"block_tables: expected 0\.\.5, got -1"),
        ({"block_tables": TABLES.long()}, "block_tables: expected dtype Int"),
        ({"lengths": LENGTHS + 1}, r"lengths: expected 0\.\.12, what block_tables have room for, got 13"),
        ({"lengths": -LENGTHS}, r"lengths: expected 0\.\.12"),
        ({"lengths": LENGTHS.float()}, "lengths: expected dtype Long"),
        ({"query_starts": torch.tensor([0, 2, 5])}, "query_starts: expected numbers that rise from 0 to the 4 tokens"),
        ({"query_starts": torch.tensor([0, 5, 4])}, "query_starts: expected numbers that rise"),
        ({"query_starts": torch.tensor([-1, 2, 4])}, "query_starts: expected numbers that rise"),
    ],
)
def test_paged_errors(changes: dict, message: str) -> None:
    arguments = {"query": torch.ones(4, 2, 16), "key_cache": PAGES, "value_cache": PAGES, "block_tables": TABLES}
    arguments |= {"lengths": LENGTHS, "query_starts": torch.tensor([0, 3, 4]), "scale": 1.0}
    with pytest.raises(RuntimeError, match=message):
        ops.paged_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.tensor([0, 24, 1])}, r"slots: expected -1 \(skip\) or 0\.\.23, got 24"),
        ({"slots": torch.tensor([0, -2, 1])}, "slots: expected"),
        ({"slots": torch.tensor([0, 2])}, r"slots: expected shape \[3\]"),
        ({"value": torch.ones(2, 2, 16)}, r"value: expected shape \[3, 2, 16\]"),
        ({"value": torch.ones(3, 2, 16).half()}, "value: expected dtype Float"),
        ({"value_cache": torch.zeros(5, 2, 4, 16)}, "value_cache: expected as many blocks"),
        ({"value_cache": torch.zeros(6, 1, 4, 16)}, r"value_cache: expected shape \[6, 2, 4, 16\]"),
    ],
)
def test_paged_write_errors(changes: dict, message: str) -> None:
    pages = torch.zeros(6, 2, 4, 16)
    arguments = {"key": torch.ones(3, 2, 16), "value": torch.ones(3, 2, 16), "key_cache": pages, "value_cache": pages}
    with pytest.raises(RuntimeError, match=message):
        ops.write_paged_cache(**(arguments | {"slots": torch.tensor([0, 1, 2])} | changes))
    assert not pages.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_starts": torch.tensor([0, 5])}, "key_starts: expected 3 numbers as query_starts has, got 2"),
        ({"key_starts": torch.tensor([0, 6, 5])}, "key_starts: expected numbers that rise from 0 to the 5 tokens"),
        ({"key": torch.ones(5, 2, 8)}, r"key: expected shape \[5, 2, 16\]"),
        ({"value": torch.ones(4, 2, 16)}, r"value: expected shape \[5, 2, 16\]"),
        ({"key": torch.ones(5, 2, 16).half()}, "key: expected dtype Float"),
    ],
)
def test_varlen_errors(changes: dict, message: str) -> None:
    arguments = {"query": torch.ones(4, 2, 16), "key": torch.ones(5, 2, 16), "value": torch.ones(5, 2, 16)}
    arguments |= {"query_starts": torch.tensor([0, 3, 4]), "key_starts": torch.tensor([0, 3, 5]), "scale": 1.0}
    with pytest.raises(RuntimeError, match=message):
        ops.varlen_attention(**(arguments | changes))


def test_opcheck() -> None:
    pages8, scales = torch.zeros(6, 2, 4, 16, dtype=torch.int8), torch.zeros(6, 2, 4)
    cache, tokens, starts = torch.zeros(2, 2, 20, 16), torch.ones(4, 2, 16), torch.tensor([0, 3, 4])
    slots, options = torch.tensor([3, -1, 5, 7]), (0.25, True, 0, 0.0, None)
    fused = (QKV, ANGLES, ANGLES, 16, False, cache, cache.clone(), None, None, 5, 0.25, None, 0, 0.0, None)
    cases = {
        "fused_rope_attention": fused,
        "write_paged_cache": (tokens, tokens, pages8, pages8.clone(), scales, scales.clone(), slots),
        "paged_attention": (tokens, PAGES, PAGES, None, None, TABLES, LENGTHS, starts, *options),
        "varlen_attention": (tokens, tokens[:, :1], tokens[:, :1, :8], starts, starts, *options),
    }
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(torch.ops.ipex_quant, name).default, arguments)
