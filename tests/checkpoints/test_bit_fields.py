import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.checkpoints.bit_fields import pack_fields, unpack_fields, word_count


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_the_format(bits, pack_column):
    fields = torch.randint(0, 1 << bits, (3, 96), dtype=torch.uint8)
    words = torch.tensor([pack_column(row, bits) for row in fields.tolist()], dtype=torch.int32)
    assert torch.equal(pack_fields(fields, bits), words)
    assert torch.equal(unpack_fields(words, bits, 96), fields)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(1, 70), st.integers(0, 99))
def test_round_trip_of_any_width_and_length(bits, rows, count, seed):
    fields = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_fields(fields, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, word_count(count, bits))
    assert torch.equal(unpack_fields(words, bits, count), fields)


def test_words_need_not_be_contiguous(pack_column):
    fields = torch.randint(0, 16, (16, 3), dtype=torch.uint8)
    words = torch.tensor([pack_column(row, 4) for row in fields.t().tolist()], dtype=torch.int32).t()
    assert torch.equal(unpack_fields(words.t(), 4, 16).t(), fields)
