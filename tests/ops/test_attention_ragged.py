"""Paged and ragged attention, and writing blocks, against their plain-torch definition, at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_attention as reference

from .attention_oracle import assert_int8_close
from .test_attention import DTYPES, generator, normal
from .test_attention_fused import caches, close, copies, equal


def check_paged(arguments: tuple[torch.Tensor, ...], **options) -> None:
    result = ops.paged_attention(*arguments, **options)
    if options["key_scales"] is None:
        close(result, reference.paged_attention(*arguments, **options))
    else:
        assert_int8_close(result, reference.paged_attention, *arguments, **options)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    new=st.lists(st.sampled_from([0, 1, 3, 30]), min_size=4, max_size=4),
    block=st.sampled_from([1, 4, 7, 16, 32]),
    heads=st.sampled_from([(2, 2), (8, 2), (5, 1)]),
    dim=st.sampled_from([32, 64, 24]),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    options=st.sampled_from([{}, {"window": 5}, {"softcap": 4.0}, {"causal": False}, {"alibi": True}]),
)
def test_paged_attention(lengths, new, block, heads, dim, dtype, int8, options) -> None:
    heads, kv_heads = heads
    pages = caches((70, kv_heads, block, dim), dtype, int8)
    width = max(lengths) // block + 1
    tables = torch.randint(0, 70, (len(lengths), width), generator=generator(1), dtype=torch.int32)
    starts = torch.tensor([0, *new[: len(lengths)]]).cumsum(0).int()
    query = normal(int(starts[-1]), heads, dim, dtype=dtype)
    arguments = (query, *pages[:2], tables, torch.tensor(lengths), starts)
    options = options | {"scale": 0.2, "key_scales": pages[2], "value_scales": pages[3]}
    if "alibi" in options:
        options["alibi"] = torch.rand(heads, generator=generator(5)) / 8
    check_paged(arguments, **options)


@settings(max_examples=40, deadline=None)
@given(
    slots=st.lists(st.integers(0, 5 * 4 - 1), max_size=9, unique=True),
    skipped=st.sets(st.integers(0, 8)),
    dims=st.sampled_from([(24, 24), (16, 40), (7, 1)]),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_write_paged_cache(slots, skipped, dims, dtype, int8, index) -> None:
    key, value = (normal(len(slots), 6, d, dtype=dtype, seed=d)[:, ::2] for d in dims)
    slots = torch.tensor([-1 if i in skipped else slot for i, slot in enumerate(slots)], dtype=index)
    (keys, _, key_scales, _), (_, values, _, value_scales) = (caches((5, 3, 4, d), dtype, int8) for d in dims)
    got = [keys, values, key_scales, value_scales]
    expected = copies(got)
    ops.write_paged_cache(key, value, got[0], got[1], slots, got[2], got[3])
    reference.write_paged_cache(key, value, expected[0], expected[1], slots, expected[2], expected[3])
    assert equal(got, expected)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 1, 3, 40])), min_size=1, max_size=4),
    block=st.sampled_from([1, 4, 7, 32]),
    heads=st.sampled_from([(2, 2), (8, 2), (5, 1)]),
    dims=st.sampled_from([(32, 32), (64, 16), (24, 0)]),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    interleaved=st.booleans(),
    options=st.sampled_from([{}, {"window": 5}, {"softcap": 4.0}, {"alibi": True}]),
)
def test_paged_rope_attention(lengths, block, heads, dims, dtype, int8, interleaved, options) -> None:
    """Prompts and single tokens together; what is written has the same bits in both, what is computed nearly."""
    (heads, kv_heads), (dim, rotary_dim) = heads, dims
    width = max(past + new for past, new in lengths) // block + 1
    pages = caches((len(lengths) * width, kv_heads, block, dim), dtype, int8)
    blocks = torch.randperm(len(lengths) * width, generator=generator(1)).int().view(len(lengths), width)
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    batch = blocks, torch.tensor([past + new for past, new in lengths]), starts
    qkv = normal(int(starts[-1]), (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = normal(1, len(qkv), rotary_dim // 2, seed=3)
    if "alibi" in options:
        options = {"alibi": torch.rand(heads, generator=generator(5)) / 8}
    options |= {"scale": 0.2, "rotary_dim": rotary_dim, "interleaved": interleaved}
    written = [copies(pages) for _ in range(2)]
    results = [
        function(qkv, angles.cos(), angles.sin(), *own[:2], batch, *own[2:], **options)
        for function, own in zip((ops.paged_rope_attention, reference.paged_rope_attention), written, strict=True)
    ]
    for got, expected in zip(*written, strict=True):
        assert got is expected is None or torch.allclose(
            got.float(), expected.float(), rtol=0.02, atol=1.0 if int8 else 0.02
        )
    if int8:
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
    else:
        close(*results)


def test_paged_rope_attention_divides_what_two_calls_do() -> None:
    """A prompt in one call, or in two chunks with another sequence's tokens between."""
    qkv, angles = normal(12, 6 * 16, dtype=torch.bfloat16), normal(1, 12, 8, seed=3)
    blocks, whole = caches((8, 1, 4, 16), torch.bfloat16, False), []
    tables = torch.tensor([[5, 0, 3]], dtype=torch.int32)

    def run(begin: int, end: int, pages: tuple[torch.Tensor, ...]) -> torch.Tensor:
        tokens = slice(begin, end)
        tables = angles.cos()[:, tokens], angles.sin()[:, tokens]
        return ops.paged_rope_attention(qkv[tokens], *tables, *blocks[:2], pages, scale=0.25)

    whole = run(0, 12, (tables, torch.tensor([12]), torch.tensor([0, 12])))
    first = run(0, 7, (tables, torch.tensor([7]), torch.tensor([0, 7])))
    both = torch.tensor([[5, 0, 3], [6, 7, 7]], dtype=torch.int32), torch.tensor([12, 1])
    qkv = torch.cat((qkv, qkv[:1]))
    angles = torch.cat((angles, angles[:, :1]), 1)
    second = run(7, 13, (*both, torch.tensor([0, 5, 6])))
    close(torch.cat((first, second[:5])), whole)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("options", [{}, {"window": 1000}])
def test_long_sequences_are_divided(int8: bool, queries: int, options) -> None:
    """The second sequence is short, but in blocks as the first one's queries are."""
    pages = caches((90, 2, 16, 64), torch.float32, int8)
    tables = torch.randperm(90, generator=generator(1)).int().expand(2, 90)
    starts = torch.tensor([0, queries, queries + 1])
    arguments = (normal(queries + 1, 8, 64), *pages[:2], tables, torch.tensor([1433, 200]), starts)
    check_paged(arguments, scale=0.2, key_scales=pages[2], value_scales=pages[3], **options)


def test_blocks_are_read_as_they_were_written() -> None:
    """A prompt and then a token, written to scattered blocks, against one contiguous cache."""
    query, key, value = normal(11, 4, 32), normal(11, 2, 32, seed=1), normal(11, 2, 32, seed=2)
    blocks, table = caches((9, 2, 4, 32), torch.float32, False), torch.tensor([[7, 2, 5]], dtype=torch.int32)
    slots = (table[0, :, None] * 4 + torch.arange(4)).flatten()[:11]
    for begin, end in ((0, 10), (10, 11)):
        ops.write_paged_cache(key[begin:end], value[begin:end], *blocks[:2], slots[begin:end])
        starts, lengths = torch.tensor([0, end - begin]), torch.tensor([end])
        result = ops.paged_attention(query[begin:end], *blocks[:2], table, lengths, starts, scale=0.2)
        states = (x.transpose(0, 1)[None] for x in (query[begin:end], key[:end], value[:end]))
        assert torch.equal(result[None], ops.attention(*states, scale=0.2, causal=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 2), (3, 3), (8, 1)]),
    dims=st.sampled_from([(16, 16), (64, 48), (7, 5), (128, 128)]),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from([{}, {"causal": True}, {"window": 5}, {"softcap": 4.0}, {"alibi": True}]),
)
def test_varlen_attention(lengths, heads, dims, dtype, options) -> None:
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0) for i in range(2)]
    query = normal(int(starts[0][-1]), heads[0], dims[0], dtype=dtype)
    key, value = (normal(int(starts[1][-1]), heads[1], d, dtype=dtype, seed=d) for d in dims)
    if "alibi" in options:
        options = {"alibi": torch.rand(heads[0], generator=generator(5)) / 8}
    arguments = (query, key, value, starts[0].int(), starts[1])
    result = ops.varlen_attention(*arguments, scale=0.3, **options)
    close(result, reference.varlen_attention(*arguments, scale=0.3, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_sequence(dtype: torch.dtype) -> None:
    starts = torch.tensor([0, 5, 9, 12])
    query, key, value = (normal(12, 2, 32, dtype=dtype, seed=seed) for seed in range(3))
    clean = ops.varlen_attention(query, key, value, starts, starts, scale=0.25)
    key[6] = torch.nan
    result = ops.varlen_attention(query, key, value, starts, starts, scale=0.25)
    assert result[5:9].isnan().all()
    assert torch.equal(result[:5], clean[:5])
    assert torch.equal(result[9:], clean[9:])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("queries", [1, 4])
def test_nan_stays_in_the_sequences_of_its_block(int8: bool, queries: int) -> None:
    pages = caches((9, 2, 4, 32), torch.float32, int8)
    tables = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=torch.int32)
    query = normal(3 * queries, 4, 32)
    starts, lengths = torch.arange(4) * queries, torch.tensor([12, 9, 10])
    scales = {"key_scales": pages[2], "value_scales": pages[3]}

    def run() -> torch.Tensor:
        return ops.paged_attention(query, *pages[:2], tables, lengths, starts, scale=0.2, **scales).clone()

    clean = run()
    (pages[3] if int8 else pages[1])[4] = torch.nan
    result = run()
    assert result[queries : 2 * queries].isnan().all()
    assert torch.equal(result[:queries], clean[:queries])
    assert torch.equal(result[2 * queries :], clean[2 * queries :])


def test_opcheck() -> None:
    pages, pages8, scales = torch.zeros(6, 2, 4, 16), torch.zeros(6, 2, 4, 16, dtype=torch.int8), torch.zeros(6, 2, 4)
    tokens, starts, options = torch.ones(4, 2, 16), torch.tensor([0, 3, 4]), (0.25, True, 0, 0.0, None)
    tables, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([12, 5])
    slots = torch.tensor([3, -1, 5, 7])
    angles, rope = torch.zeros(1, 4, 8), (pages, pages.clone(), None, None, tables, lengths, starts, 0.25, 0, 0.0, None)
    cases = [
        ("write_paged_cache", (tokens, tokens, pages8, pages8.clone(), scales, scales.clone(), slots)),
        ("write_paged_cache", (tokens, tokens, pages, pages.clone(), None, None, slots.int())),
        ("paged_attention", (tokens, pages, pages, None, None, tables, lengths, starts, *options)),
        ("paged_attention", (tokens, pages8, pages8, scales, scales, tables, lengths, starts.int(), *options)),
        ("paged_rope_attention", (tokens.flatten(1).repeat(1, 3), angles, angles, 16, False, *rope)),
        ("varlen_attention", (tokens, tokens[:, :1], tokens[:, :1, :8], starts, starts, *options)),
    ]
    for name, arguments in cases:
        torch.library.opcheck(getattr(torch.ops.ipex_quant, name).default, arguments)
