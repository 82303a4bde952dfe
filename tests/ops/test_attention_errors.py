"""Bad arguments of attention and the cache writes: a clear error, and nothing is written."""

from __future__ import annotations

import pytest
import torch

from ipex_quant import ops

QUERY, KEY, VALUE = torch.ones(2, 4, 3, 16), torch.ones(2, 2, 9, 16), torch.ones(2, 2, 9, 8)
INT8, SCALES = torch.ones(2, 2, 9, 16, dtype=torch.int8), torch.ones(2, 2, 9)
BYTES = {"key": INT8, "value": INT8, "key_scales": SCALES, "value_scales": SCALES}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": QUERY[0]}, r"query: expected 4 dimensions, got shape \[4, 3, 16\]"),
        ({"query": QUERY.double()}, "query: expected float32, bfloat16 or float16"),
        ({"query": QUERY[..., :8]}, "key: expected the head size of query, 8, got 16"),
        ({"query": QUERY[:, :3]}, "key: expected a number of heads that divides the 3 of query, got 2"),
        ({"query": QUERY[:1]}, "key: expected the batch size of query, 1, or rows; got 2"),
        ({"query": QUERY[..., :0], "key": KEY[..., :0]}, "key: expected the head size of query"),
        ({"key": KEY.bfloat16()}, "key: expected the dtype of query, int8 or float8_e5m2"),
        ({"key": KEY[:, :, :8]}, r"value: expected the shape of key but for the last dimension, \[2, 2, 8, 16\]"),
        ({"value": VALUE.half()}, "value: expected dtype Float, got Half"),
        ({"value": VALUE[:1]}, "value: expected the shape of key"),
        ({"value": VALUE[..., :0]}, "value: expected a head size"),
        ({"key_scales": SCALES}, "expected with int8 or float8 keys and values, and only there"),
        ({"key": INT8, "value": INT8}, "expected with int8 or float8 keys and values"),
        ({"key": INT8, "value": INT8, "key_scales": SCALES, "value_scales": SCALES[:1]}, r"expected shape \[2, 2, 9\]"),
        ({"key": INT8, "value": INT8, "key_scales": SCALES.half(), "value_scales": SCALES}, "dtype Float, got Half"),
        ({"mask": torch.ones(2, 3, 9)}, "mask: expected 4 dimensions"),
        ({"mask": torch.ones(2, 1, 3, 8)}, "mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(1, 1, 1, 9, dtype=torch.int64)}, "mask: expected float32, bfloat16 or float16"),
        ({"alibi": torch.ones(3)}, "alibi: expected 4 elements, got 3"),
        ({"alibi": torch.ones(4).half()}, "alibi: expected dtype Float"),
        ({"rows": torch.zeros(2, 8, dtype=torch.int32)}, r"rows: expected shape \[2, 9\]"),
        ({"rows": torch.zeros(2, 9, dtype=torch.int64)}, "rows: expected dtype Int"),
        ({"rows": torch.full((2, 9), 2, dtype=torch.int32)}, r"rows: expected values in 0\.\.1, got 2"),
        ({"rows": torch.full((2, 9), -1, dtype=torch.int32)}, r"rows: expected values in 0\.\.1, got -1"),
        ({"scale": float("nan")}, "scale: expected a finite float32"),
        ({"scale": 1e300}, "scale: expected a finite float32"),
        ({"softcap": 1e300}, "softcap: expected 0"),
        ({"softcap": 1e-320}, "softcap: expected 0"),
        ({"key_factors": torch.ones(2, 16)}, "key_factors: expected only with an int8 cache"),
        ({**BYTES, "key_factors": torch.ones(4, 16)}, r"key_factors: expected shape \[2, 16\], got \[4, 16\]"),
        ({**BYTES, "key_factors": torch.ones(2, 16).double()}, "key_factors: expected dtype Float"),
        ({**BYTES, "key_factors": torch.ones(16, 2).t()}, "key_factors: expected a contiguous tensor"),
        ({"window": -1}, "window: expected 0"),
        ({"softcap": -2.0}, "softcap: expected 0"),
    ],
)
def test_attention(changes: dict, message: str) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "scale": 1.0} | changes
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    with pytest.raises(RuntimeError, match=message):
        ops.attention(query, key, value, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": KEY[0]}, "key: expected 4 dimensions"),
        ({"key": KEY[:1]}, "cache: expected the batch size of key, 1, got 2"),
        ({"key": KEY[..., :8]}, "cache: expected shape"),
        ({"key": KEY.half()}, "cache: expected the dtype of what is written, int8 or float8_e5m2, got Float"),
        ({"key": KEY.long()}, "key: expected float32, bfloat16 or float16"),
        ({"cache": torch.zeros(2, 2, 12, 32)[..., ::2]}, "cache: expected adjacent elements"),
        ({"start": 4}, "start: 9 tokens do not fit a cache of 12 from 4"),
        ({"start": -1}, "start: 9 tokens do not fit"),
        ({"start": 2**62}, "start: 9 tokens do not fit"),
        ({"scales": torch.zeros(2, 2, 12)}, "cache: expected scales with an int8 or float8 cache"),
        ({"cache": torch.zeros(2, 2, 12, 16, dtype=torch.int8)}, "cache: expected scales with an int8 or float8 cache"),
        (
            {"cache": torch.zeros(2, 2, 12, 16, dtype=torch.int8), "scales": torch.zeros(2, 2, 9)},
            r"scales: expected shape \[2, 2, 12\]",
        ),
    ],
)
def test_write_cache(changes: dict, message: str) -> None:
    arguments = {"key": KEY, "cache": torch.zeros(2, 2, 12, 16), "scales": None, "start": 0} | changes
    with pytest.raises(RuntimeError, match=message):
        ops.write_cache(**arguments)
    assert not arguments["cache"].any()
    assert arguments["scales"] is None or not arguments["scales"].any()


QKV, ANGLES = torch.ones(2, 3, 8 * 16), torch.ones(1, 3, 8)


def int8_caches() -> dict:
    caches = {name: torch.zeros(2, 2, 20, 16, dtype=torch.int8) for name in ("key_cache", "value_cache")}
    return caches | {name: torch.zeros(2, 2, 20) for name in ("key_scales", "value_scales")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv: expected 3 dimensions, got shape \[3, 128\]"),
        ({"qkv": QKV[..., :-1]}, r"qkv: expected \[batch, length, \(heads \+ 4\) \* 16\], got \[2, 3, 127\]"),
        ({"qkv": QKV[..., :64]}, "qkv: expected"),
        ({"qkv": QKV[..., :-16]}, "key: expected a number of heads that divides the 3 of query, got 2"),
        ({"qkv": QKV[:1]}, "key_cache: expected the batch size of qkv, 1, got 2"),
        ({"qkv": QKV.half()}, "key_cache: expected the dtype of what is written, int8 or float8_e5m2, got Float"),
        ({"qkv": QKV.double()}, "qkv: expected float32, bfloat16 or float16"),
        ({"cos": ANGLES[:, :2]}, "cos: expected shape"),
        ({"cos": ANGLES.double()}, "cos: expected float32 or the dtype of x"),
        ({"sin": ANGLES.repeat(1, 1, 2)}, "sin: expected shape"),
        ({"rotary_dim": 18}, "rotary_dim: expected an even number up to 16, got 18"),
        ({"rotary_dim": 3}, "rotary_dim: expected an even number"),
        ({"rotary_dim": -2}, "rotary_dim: expected an even number"),
        ({"start": 18}, "start: 3 tokens do not fit a cache of 20 from 18"),
        ({"start": -1}, "start: 3 tokens do not fit"),
        ({"start": 2**62}, "start: 3 tokens do not fit"),
        ({"key_cache": torch.zeros(2, 20, 16)}, "key_cache: expected 4 dimensions"),
        ({"key_cache": torch.zeros(2, 2, 20, 32)[..., ::2]}, "key_cache: expected adjacent elements of a token"),
        ({"value_cache": torch.zeros(2, 2, 20, 32)[..., ::2]}, "value_cache: expected adjacent elements of a token"),
        ({"value_cache": torch.zeros(2, 2, 19, 16)}, "value: expected the shape of key"),
        ({"value_cache": torch.zeros(1, 2, 20, 16)}, "value: expected the shape of key"),
        ({"value_cache": torch.zeros(2, 3, 20, 16)}, r"value_cache: expected shape \[2, 2, 20, 16\]"),
        ({"value_cache": torch.zeros(2, 2, 20, 8)}, r"value_cache: expected shape \[2, 2, 20, 16\]"),
        ({"key_scales": torch.zeros(2, 2, 20)}, "key_cache: expected scales with an int8 or float8 cache"),
        (int8_caches() | {"value_scales": None}, "value_cache: expected scales with an int8 or float8 cache"),
        (int8_caches() | {"key_scales": torch.zeros(2, 2, 19)}, r"scales: expected shape \[2, 2, 20\]"),
        (int8_caches() | {"key_scales": torch.zeros(2, 2, 20).half()}, "scales: expected dtype Float, got Half"),
        (int8_caches() | {"mask": torch.ones(3, 3)}, "mask: expected 4 dimensions"),
        ({"mask": torch.ones(3, 3)}, r"mask: expected 4 dimensions, got shape \[3, 3\]"),
        ({"mask": torch.ones(2, 1, 1, 20)}, "mask: expected a shape that broadcasts"),
        ({"alibi": torch.ones(2)}, "alibi: expected 4 elements, got 2"),
        ({"window": -1}, "window: expected 0"),
        ({"scale": float("inf")}, "scale: expected a finite float32"),
    ],
)
def test_fused_rope_attention(changes: dict, message: str) -> None:
    arguments = {"qkv": QKV, "cos": ANGLES, "sin": ANGLES, "start": 0, "scale": 1.0}
    arguments |= {"key_cache": torch.zeros(2, 2, 20, 16), "value_cache": torch.zeros(2, 2, 20, 16)} | changes
    with pytest.raises(RuntimeError, match=message):
        ops.fused_rope_attention(**arguments)
    for name in ("key_cache", "value_cache", "key_scales", "value_scales"):
        assert arguments.get(name) is None or not arguments[name].any()


PAGES = torch.zeros(6, 2, 4, 16)
TABLES, LENGTHS = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([12, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(2, 2, 16, 1)}, "query: expected 3 dimensions"),
        ({"query": torch.ones(4, 3, 16)}, "key: expected a number of heads that divides the 3"),
        ({"query": torch.ones(4, 2, 8)}, "key: expected the head size of query, 8, got 16"),
        ({"query": torch.ones(4, 2, 16).bfloat16()}, "key: expected the dtype of query, int8 or float8_e5m2"),
        ({"key_cache": PAGES[0], "value_cache": PAGES[0]}, "key: expected 4 dimensions"),
        ({"key_cache": PAGES[:, :, :0], "value_cache": PAGES[:, :, :0]}, "key: expected blocks of tokens"),
        ({"value_cache": PAGES[:5]}, "value: expected the shape of key"),
        ({"key_scales": torch.zeros(6, 2, 4)}, "expected with int8 or float8 keys and values"),
        ({"block_tables": TABLES[0]}, r"block_tables: expected shape \[2, blocks\]"),
        ({"block_tables": TABLES[:1]}, r"block_tables: expected shape \[2, blocks\]"),
        ({"block_tables": TABLES + 6}, r"block_tables: expected values in 0\.\.5, got 6"),
        ({"block_tables": TABLES - 1}, r"block_tables: expected values in 0\.\.5, got -1"),
        ({"block_tables": TABLES.long()}, "block_tables: expected dtype Int"),
        ({"block_tables": TABLES[:, :2]}, r"lengths: expected 0\.\.8, what block_tables have room for, got 12"),
        ({"lengths": LENGTHS + 1}, r"lengths: expected 0\.\.12, what block_tables have room for, got 13"),
        ({"lengths": -LENGTHS}, r"lengths: expected 0\.\.12"),
        ({"lengths": LENGTHS.float()}, "lengths: expected dtype Long"),
        ({"lengths": LENGTHS[:1]}, r"lengths: expected shape \[2\]"),
        ({"query_starts": torch.tensor([0, 2, 5])}, "query_starts: expected numbers that rise from 0 to the 4 tokens"),
        ({"query_starts": torch.tensor([0, 5, 4])}, "query_starts: expected numbers that rise"),
        ({"query_starts": torch.tensor([-1, 2, 4])}, "query_starts: expected numbers that rise"),
        ({"query_starts": torch.zeros(0, dtype=torch.int64)}, "query_starts: expected one number more"),
        ({"alibi": torch.ones(3)}, "alibi: expected 2 elements, got 3"),
        ({"window": -1}, "window: expected 0"),
    ],
)
def test_paged_attention(changes: dict, message: str) -> None:
    arguments = {"query": torch.ones(4, 2, 16), "key_cache": PAGES, "value_cache": PAGES, "block_tables": TABLES}
    arguments |= {"lengths": LENGTHS, "query_starts": torch.tensor([0, 3, 4]), "scale": 1.0}
    with pytest.raises(RuntimeError, match=message):
        ops.paged_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.tensor([0, 24, 1])}, r"slots: expected -1 \(skip\) or 0\.\.23, got 24"),
        ({"slots": torch.tensor([0, 1, -2])}, "slots: expected -1"),
        ({"slots": torch.tensor([0, 1, 2**62])}, "slots: expected -1"),
        ({"slots": torch.tensor([0, 2])}, r"slots: expected shape \[3\]"),
        ({"slots": torch.tensor([[0, 2, 1]])}, r"slots: expected shape \[3\]"),
        ({"slots": torch.tensor([0.0, 2.0, 1.0])}, "slots: expected dtype Long"),
        ({"key": torch.ones(3, 32)}, "key: expected 3 dimensions"),
        ({"key": torch.ones(3, 1, 16)}, r"value: expected shape \[3, 1, 16\]"),
        ({"value": torch.ones(2, 2, 16)}, r"value: expected shape \[3, 2, 16\]"),
        ({"value": torch.ones(3, 2, 16).half()}, "value: expected dtype Float"),
        ({"key_cache": torch.zeros(6, 2, 4, 8)}, r"key_cache: expected shape \[6, 2, 4, 16\]"),
        ({"key_cache": torch.zeros(6, 2, 4, 32)[..., ::2]}, "key_cache: expected adjacent elements"),
        ({"value_cache": torch.zeros(5, 2, 4, 16)}, "value_cache: expected as many blocks"),
        ({"value_cache": torch.zeros(6, 2, 3, 16)}, "value_cache: expected as many blocks"),
        ({"value_cache": torch.zeros(6, 1, 4, 16)}, r"value_cache: expected shape \[6, 2, 4, 16\]"),
        ({"value_cache": torch.zeros(6, 2, 4, 16, dtype=torch.int8)}, "value_cache: expected scales with an int8"),
        ({"key_scales": torch.zeros(6, 2, 4)}, "key_cache: expected scales with an int8 or float8 cache"),
    ],
)
def test_write_paged_cache(changes: dict, message: str) -> None:
    arguments = {"key": torch.ones(3, 2, 16), "value": torch.ones(3, 2, 16), "slots": torch.tensor([0, 1, 2])}
    arguments |= {"key_cache": torch.zeros(6, 2, 4, 16), "value_cache": torch.zeros(6, 2, 4, 16)} | changes
    with pytest.raises(RuntimeError, match=message):
        ops.write_paged_cache(**arguments)
    assert not arguments["key_cache"].any()
    assert not arguments["value_cache"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_starts": torch.tensor([0, 5])}, "key_starts: expected 3 numbers as query_starts has, got 2"),
        ({"key_starts": torch.tensor([0, 6, 5])}, "key_starts: expected numbers that rise from 0 to the 5 tokens"),
        ({"query_starts": torch.tensor([0, 3, 3])}, "query_starts: expected numbers that rise from 0 to the 4 tokens"),
        ({"query_starts": torch.tensor([0.0, 3.0, 4.0])}, "query_starts: expected dtype Long"),
        ({"query": torch.ones(1, 4, 2, 16)}, "query: expected 3 dimensions"),
        ({"query": torch.ones(4, 3, 16)}, "key: expected a number of heads that divides the 3"),
        ({"key": torch.ones(5, 2, 8)}, r"key: expected shape \[5, 2, 16\]"),
        ({"key": torch.ones(5, 2, 16).half()}, "key: expected dtype Float"),
        ({"value": torch.ones(4, 2, 16)}, r"value: expected shape \[5, 2, 16\]"),
        ({"value": torch.ones(5, 2, 0)}, "value: expected a head size"),
        ({"alibi": torch.ones(1)}, "alibi: expected 2 elements, got 1"),
    ],
)
def test_varlen_attention(changes: dict, message: str) -> None:
    arguments = {"query": torch.ones(4, 2, 16), "key": torch.ones(5, 2, 16), "value": torch.ones(5, 2, 16)}
    arguments |= {"query_starts": torch.tensor([0, 3, 4]), "key_starts": torch.tensor([0, 3, 5]), "scale": 1.0}
    with pytest.raises(RuntimeError, match=message):
        ops.varlen_attention(**(arguments | changes))
