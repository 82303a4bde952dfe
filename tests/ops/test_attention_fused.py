"""Rotation, cache write and attention in one call against their plain-torch definition, at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_attention as reference

from .attention_oracle import assert_int8_close
from .test_attention import DTYPES, TOLERANCE, generator, normal

Caches = list[torch.Tensor | None]


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def caches(shape: tuple[int, ...], dtype: torch.dtype, int8: bool) -> Caches:
    """Key cache, value cache and their scales, filled with something."""
    if not int8:
        return [normal(*shape, dtype=dtype, seed=7), normal(*shape, dtype=dtype, seed=8), None, None]
    (key, key_scales), (value, value_scales) = (reference.quantize_token(normal(*shape, seed=i)) for i in (7, 8))
    return [key, value, key_scales, value_scales]


def copies(tensors: Caches) -> Caches:
    return [None if t is None else t.clone() for t in tensors]


def equal(got: Caches, expected: Caches) -> bool:
    return all(a is None or torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_written(got: Caches, expected: Caches) -> None:
    for a, b in zip(got, expected, strict=True):
        if a is not None and a.dtype == torch.int8:  # a turned key may fall on either side of a half
            assert (a.int() - b.int()).abs().max() <= 1
        elif a is not None:
            torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(4, 4), (4, 1), (6, 2), (8, 1), (7, 1)]),
    length=st.sampled_from([1, 1, 3, 20]),
    start=st.sampled_from([0, 5, 70, 140]),
    dim=st.sampled_from([8, 33, 64, 80, 128]),
    rotary=st.sampled_from([0, 4, None]),
    tables=st.sampled_from(["half", "full", "batch", "dtype"]),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    options=st.sampled_from(
        [{}, {"window": 7}, {"softcap": 3.0}, {"alibi": True}, {"mask": "bool"}, {"mask": "float"}]
    ),
    strided=st.booleans(),
)
def test_close_to_the_definition(
    batch, heads, length, start, dim, rotary, tables, interleaved, dtype, int8, options, strided
) -> None:
    heads, kv_heads = heads
    rotary = dim - dim % 2 if rotary is None else rotary
    qkv = normal(batch, length, (heads + 2 * kv_heads) * dim + 6, dtype=dtype)[..., 3:-3]
    angles = normal(batch if tables == "batch" else 1, length, rotary // 2, seed=3)
    if tables == "full":
        angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 2)
    cos, sin = (x.to(dtype if tables == "dtype" else torch.float32) for x in (angles.cos(), angles.sin()))
    options = options | {"start": start, "scale": dim**-0.5, "rotary_dim": rotary, "interleaved": interleaved}
    if "alibi" in options:
        options["alibi"] = torch.rand(heads, generator=generator(5)) / 8
    if options.get("mask") == "bool":
        options["mask"] = torch.rand(batch, 1, 1, start + length, generator=generator(4)) < 0.8
    elif "mask" in options:
        options["mask"] = normal(1, heads, length, start + length, dtype=dtype, seed=4)
    buffers = caches((batch, kv_heads, start + length + 9, dim), dtype, int8)
    if strided:  # as a sliding window sees a cache: without its first tokens
        buffers = [None if t is None else torch.cat([t, t], dim=2)[:, :, 4:-2] for t in buffers]
    expected_buffers = copies(buffers)
    result = ops.fused_rope_attention(qkv, cos, sin, *buffers, **options)
    expected = reference.fused_rope_attention(qkv, cos, sin, *expected_buffers, **options)
    assert result.shape == (batch, length, heads * dim)
    assert result.is_contiguous()
    assert_written(buffers, expected_buffers)
    if not int8:
        return close(result, expected)
    # Of the queries and the cache as they were turned and written, whose codes may be others than the definition's.
    query = qkv.unflatten(2, (-1, dim))[:, :, :heads]
    query = ops.rotary(query, cos, sin, rotary_dim=rotary, interleaved=interleaved).transpose(1, 2)
    key, value, key_scales, value_scales = (t[:, :, : start + length] for t in buffers)
    options = {name: options[name] for name in options.keys() - {"start", "rotary_dim", "interleaved"}}
    options |= {"key_scales": key_scales, "value_scales": value_scales, "causal": True}
    result = result.unflatten(2, (heads, dim))
    return assert_int8_close(result, reference.attention, query, key, value, **options)


@pytest.mark.parametrize("heads", [8, 18])
@pytest.mark.parametrize("int8", [False, True])
def test_is_the_same_as_its_parts(int8: bool, heads: int) -> None:
    dtype, groups = torch.bfloat16, (heads - 4, 2, 2)
    qkv, angles = normal(2, 3, heads * 16, dtype=dtype), normal(1, 3, 8)
    fused, apart = (caches((2, 2, 20, 16), dtype, int8) for _ in range(2))
    result = ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *fused, start=4, scale=0.25)
    queries, keys, values = qkv.unflatten(2, (heads, 16)).split(groups, dim=2)
    queries, keys = (ops.rotary(x, angles.cos(), angles.sin()).transpose(1, 2) for x in (queries, keys))
    ops.write_cache(keys, apart[0], apart[2], 4)
    ops.write_cache(values.transpose(1, 2), apart[1], apart[3], 4)
    seen = [None if t is None else t[:, :, :7] for t in apart]
    scales = {"key_scales": seen[2], "value_scales": seen[3]}
    expected = ops.attention(queries, seen[0], seen[1], scale=0.25, causal=True, **scales)
    assert torch.equal(result, expected.flatten(2))
    assert equal(fused, apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_nan_stays_in_its_sequence(dtype: torch.dtype, int8: bool) -> None:
    angles = normal(1, 2, 16)
    qkv = normal(3, 2, 8 * 32, dtype=dtype)
    clean = caches((3, 2, 30, 32), dtype, int8)
    touched = copies(clean)
    expected = ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *clean, start=9, scale=0.2)
    qkv[1, 1, -1] = torch.nan
    result = ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *touched, start=9, scale=0.2)
    assert torch.equal(result[::2], expected[::2])
    assert result[1, 1, 64:].isnan().any()  # of the queries that share the second KV head
    assert torch.equal(result[1, :, :64], expected[1, :, :64])
    assert equal([None if t is None else t[::2] for t in touched], [None if t is None else t[::2] for t in clean])


@pytest.mark.parametrize("int8", [False, True])
def test_writes_nothing_but_the_new_tokens(int8: bool) -> None:
    angles, qkv = normal(1, 3, 8), normal(2, 3, 6 * 16)
    buffers = caches((2, 2, 30, 16), torch.float32, int8)
    before = copies(buffers)
    ops.fused_rope_attention(qkv, angles.cos(), angles.sin(), *buffers, start=11, scale=0.2)
    for after, old in zip(buffers, before, strict=True):
        if after is not None:
            assert torch.equal(after[:, :, :11], old[:, :, :11])
            assert not torch.equal(after[:, :, 11:14], old[:, :, 11:14])
            assert torch.equal(after[:, :, 14:], old[:, :, 14:])


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck(int8: bool) -> None:
    qkv, angles, buffers = torch.ones(2, 3, 8 * 16), torch.ones(1, 3, 8), caches((2, 2, 20, 16), torch.float32, int8)
    fused = torch.ops.ipex_quant.fused_rope_attention.default
    options = (5, 0.25, torch.ones(1, 1, 3, 8), 0, 0.0, torch.ones(4))
    torch.library.opcheck(fused, (qkv, angles, angles, 16, False, *buffers, *options))


def test_one_graph_serves_every_position() -> None:
    """What a compiled decoder does for each token: the position is a number that changes, and no constant."""
    buffers, apart = caches((1, 2, 64, 16), torch.float32, False), caches((1, 2, 64, 16), torch.float32, False)

    def step(qkv: torch.Tensor, angles: torch.Tensor, start: int) -> torch.Tensor:
        attended = ops.fused_rope_attention(qkv * 2, angles.cos(), angles.sin(), *buffers, start=start, scale=0.25)
        states = qkv.unflatten(2, (8, 16)).transpose(1, 2)
        ops.write_cache(states[:, :2], apart[0], None, start)
        return attended + 1

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for start in range(3, 9):
        qkv, angles = normal(1, 1, 8 * 16, seed=start), normal(1, 1, 8, seed=start)
        before = copies(buffers)
        result = compiled(qkv, angles, start)
        written = copies(buffers)
        for buffer, old in zip(buffers, before, strict=True):
            if buffer is not None:
                buffer.copy_(old)
        assert torch.equal(result, step(qkv, angles, start))
        assert equal(buffers, written)
    assert len(graphs) == 1
