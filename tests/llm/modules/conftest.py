from __future__ import annotations

import pytest
import torch


def one_sequence(
    query, key, value, scale, causal=True, left=None, right=None, softcap=None, alibi=None, mask=None
):  # fmt: skip
    """Attention of ``[L, H, D]`` to ``[T, Hkv, D]`` by its definition, a query and a head at a time, in float64."""
    queries, heads, _ = query.shape
    tokens, kv_heads, _ = key.shape
    query, key, value = query.double(), key.double(), value.double()
    result = torch.zeros(queries, heads, value.shape[2], dtype=torch.float64)
    for i in range(queries):
        position = tokens - queries + i
        low = 0 if left is None else max(position - left, 0)
        high = tokens if right is None else position + right + 1
        seen = range(low, max(min(high, position + 1 if causal else tokens, tokens), low))
        for head in range(heads) if len(seen) else ():
            kv = head * kv_heads // heads
            scores = key[seen.start : seen.stop, kv] @ query[i, head] * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if alibi is not None:
                scores = scores + alibi[head] * (torch.tensor(seen) - position)
            if mask is not None:
                scores = scores + mask[head, i, seen.start : seen.stop]
            result[i, head] = scores.softmax(0) @ value[seen.start : seen.stop, kv]
    return result


@pytest.fixture
def dense():
    """`one_sequence`."""
    return one_sequence


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
