from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.numerics.nibbles import as_bytes, pack_nibbles, unpack_nibbles


def test_even_column_is_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 3], [15, 0, 9]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x03], [0x0F, 0x09]]


@settings(deadline=None)
@given(n=st.integers(0, 5), k=st.integers(0, 33))
def test_unpack_is_the_inverse(n: int, k: int) -> None:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, k), codes)


def test_pack_leaves_its_input_alone() -> None:
    codes = torch.full((2, 4), 5, dtype=torch.uint8)
    pack_nibbles(codes)
    assert (codes == 5).all()


@pytest.mark.parametrize("function", [pack_nibbles, lambda codes: unpack_nibbles(codes, 4)])
def test_wrong_dtype_is_an_error(function) -> None:
    with pytest.raises(TypeError, match=r"expected dtype torch.uint8, got torch.int8"):
        function(torch.zeros(2, 2, dtype=torch.int8))


def test_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected 2 dimensions \[N, K\]"):
        pack_nibbles(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected shape \[N, 3\] for k = 5, got \[2, 2\]"):
        unpack_nibbles(torch.zeros(2, 2, dtype=torch.uint8), 5)


def test_bytes_of_words():
    words = torch.tensor([[0x04030201, 0x08070605]], dtype=torch.int32)
    assert as_bytes(words).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert as_bytes(words).data_ptr() == words.data_ptr()
    assert as_bytes(words.t()).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]  # as contiguous by torch's own account
    assert as_bytes(words.expand(2, 2).t()).tolist() == [[1, 2, 3, 4] * 2, [5, 6, 7, 8] * 2]
