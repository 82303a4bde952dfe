"""The transposition of 4-bit fields, byte for byte as its plain-torch definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference

PLAIN, AWQ = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randint(-(2**31), 2**31, (rows, columns), generator=generator, dtype=torch.int64).to(torch.int32)


def test_a_nibble_of_every_row_is_a_row() -> None:
    words = torch.tensor([[0x76543210], [0x0FEDCBA9]], dtype=torch.int32)
    rows = [[0x90], [0xA1], [0xB2], [0xC3], [0xD4], [0xE5], [0xF6], [0x07]]
    assert ops.transpose_nibbles(words, PLAIN).tolist() == rows
    assert ops.transpose_nibbles(words[:1], AWQ).tolist() == [[0], [4], [1], [5], [2], [6], [3], [7]]


@given(rows=st.integers(0, 400), columns=st.integers(0, 50), order=st.permutations(PLAIN))
def test_the_definition(rows: int, columns: int, order: list[int]) -> None:
    words = words_of(rows, columns)
    assert torch.equal(ops.transpose_nibbles(words, order), reference.transpose_nibbles(words, order))


@pytest.mark.parametrize(
    ("words", "order", "message"),
    [
        (torch.ones(2, 2), PLAIN, "words: expected dtype Int"),
        (words_of(2, 2)[0], PLAIN, "words: expected 2 dimensions"),
        (words_of(2, 3).t(), PLAIN, "words: expected a contiguous tensor"),
        (words_of(2, 2), PLAIN[:7], "order: expected a permutation"),
        (words_of(2, 2), (0, 1, 2, 3, 4, 5, 6, 6), "order: expected a permutation"),
        (words_of(2, 2), (0, 1, 2, 3, 4, 5, 6, -7), "order: expected a permutation"),
    ],
)
def test_what_does_not_fit_is_refused(words: torch.Tensor, order: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.transpose_nibbles(words, order)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.ipex_quant.transpose_nibbles.default, (words_of(9, 3), list(AWQ)))
