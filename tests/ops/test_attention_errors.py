"""Bad arguments of attention and the cache writes: a clear error, and nothing is written."""

from __future__ import annotations

import pytest
import torch

from ipex_quant import ops

QUERY, KEY, VALUE = torch.ones(2, 4, 3, 16), torch.ones(2, 2, 9, 16), torch.ones(2, 2, 9, 8)
INT8, SCALES = torch.ones(2, 2, 9, 16, dtype=torch.int8), torch.ones(2, 2, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": QUERY[0]}, r"query: expected 4 dimensions, got shape \[4, 3, 16\]"),
        ({"query": QUERY.double()}, "query: expected float32, bfloat16 or float16"),
        ({"query": QUERY[..., :8]}, "key: expected the head size of query, 8, got 16"),
        ({"query": QUERY[:, :3]}, "key: expected a number of heads that divides the 3 of query, got 2"),
        ({"query": QUERY[:1]}, "key: expected the batch size of query, 1, or rows; got 2"),
        ({"query": QUERY[..., :0], "key": KEY[..., :0]}, "key: expected the head size of query"),
        ({"key": KEY.bfloat16()}, "key: expected the dtype of query or int8"),
        ({"key": KEY[:, :, :8]}, r"value: expected the shape of key but for the last dimension, \[2, 2, 8, 16\]"),
        ({"value": VALUE.half()}, "value: expected dtype Float, got Half"),
        ({"value": VALUE[:1]}, "value: expected the shape of key"),
        ({"value": VALUE[..., :0]}, "value: expected a head size"),
        ({"key_scales": SCALES}, "expected with int8 keys and values, and only there"),
        ({"key": INT8, "value": INT8}, "expected with int8 keys and values"),
        ({"key": INT8, "value": INT8, "key_scales": SCALES, "value_scales": SCALES[:1]}, r"expected shape \[2, 2, 9\]"),
        ({"key": INT8, "value": INT8, "key_scales": SCALES.half(), "value_scales": SCALES}, "dtype Float, got Half"),
        ({"mask": torch.ones(2, 3, 9)}, "mask: expected 4 dimensions"),
        ({"mask": torch.ones(2, 1, 3, 8)}, "mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(1, 1, 1, 9, dtype=torch.int64)}, "mask: expected float32, bfloat16 or float16"),
        ({"alibi": torch.ones(3)}, "alibi: expected 4 elements, got 3"),
        ({"alibi": torch.ones(4).half()}, "alibi: expected dtype Float"),
        ({"rows": torch.zeros(2, 8, dtype=torch.int32)}, r"rows: expected shape \[2, 9\]"),
        ({"rows": torch.zeros(2, 9, dtype=torch.int64)}, "rows: expected dtype Int"),
        ({"rows": torch.full((2, 9), 2, dtype=torch.int32)}, r"rows: expected 0\.\.1, got 2"),
        ({"rows": torch.full((2, 9), -1, dtype=torch.int32)}, r"rows: expected 0\.\.1, got -1"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
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
        ({"key": KEY.half()}, "cache: expected the dtype of what is written or int8, got Float"),
        ({"key": KEY.long()}, "key: expected float32, bfloat16 or float16"),
        ({"cache": torch.zeros(2, 2, 12, 32)[..., ::2]}, "cache: expected adjacent elements"),
        ({"start": 4}, "start: 9 tokens do not fit a cache of 12 from 4"),
        ({"start": -1}, "start: 9 tokens do not fit"),
        ({"start": 2**62}, "start: 9 tokens do not fit"),
        ({"scales": torch.zeros(2, 2, 12)}, "cache: expected scales with an int8 cache"),
        ({"cache": torch.zeros(2, 2, 12, 16, dtype=torch.int8)}, "cache: expected scales with an int8 cache"),
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
