import pytest
import torch

from ipex_quant.numerics.bit_streams import pack_stream, stream_bytes, unpack_stream


def row_bytes(values, bits):
    """Field i of a row at bit ``bits * i`` of one large integer, in little-endian bytes."""
    return list(
        sum(value << bits * i for i, value in enumerate(values)).to_bytes(stream_bytes(len(values), bits), "little")
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [*range(1, 18), 64, 67])
def test_a_row_is_one_little_endian_integer(bits, count):
    fields = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    stream = pack_stream(fields, bits)
    assert stream.tolist() == [row_bytes(row, bits) for row in fields.tolist()]
    assert torch.equal(unpack_stream(stream, bits, count), fields)


def test_bytes_after_the_fields_are_left_out():
    fields = torch.randint(0, 8, (2, 11), dtype=torch.uint8)
    stream = torch.cat((pack_stream(fields, 3), torch.full((2, 3), 255, dtype=torch.uint8)), 1)
    assert torch.equal(unpack_stream(stream, 3, 11), fields)


def test_many_rows_that_are_not_contiguous():
    fields = torch.randint(0, 32, (40, 70_000), dtype=torch.uint8).t()
    stream = pack_stream(fields, 5)
    assert stream[12345].tolist() == row_bytes(fields[12345].tolist(), 5)
    assert torch.equal(unpack_stream(stream.t().contiguous().t(), 5, 40), fields)


def test_fields_stay_as_they_are():
    fields = torch.full((2, 16), 5, dtype=torch.uint8)
    stream = pack_stream(fields, 3)
    before = stream.clone()
    unpack_stream(stream, 3, 16)
    assert fields.eq(5).all()
    assert torch.equal(stream, before)


def test_no_rows():
    assert pack_stream(torch.empty(0, 5, dtype=torch.uint8), 5).shape == (0, 4)
    assert unpack_stream(torch.empty(0, 4, dtype=torch.uint8), 5, 5).shape == (0, 5)
