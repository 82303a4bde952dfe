"""Fields of 1 to 8 bits in int32 words, whose bytes are a stream as in `numerics/bit_streams.py`.

GPTQ's 2, 4 and 8 bit words and its 3 bit triples of words (32 values in 96 bits, some across two words) are all such
streams.
"""

from __future__ import annotations

import torch

from ..numerics.bit_streams import pack_stream, unpack_stream
from ..numerics.nibbles import as_bytes

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes of fields of 2 to 8 bits, the lowest bits first."""


def word_count(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` fields of `bits`."""
    return -(-count * bits // 32)


def unpack_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack the fields of every row: int32 ``[M, word_count(count, bits)]`` to uint8 ``[M, count]``."""
    return unpack_stream(as_bytes(words), bits, count)


def unpack_planes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack the fields of every row, int32 ``[M, words]`` to uint8 ``[M, count]``, that are stored in planes.

    32 fields take `bits` words: the streams of their low bits, and then of the higher ones, as `PLANES` says. Source:
    GPTQModel's ``planar_packing``.
    """
    blocks = words.reshape(len(words), -1, bits)
    fields = words.new_zeros((len(words) * blocks.shape[1], 32), dtype=torch.uint8)
    first = 0
    for width in PLANES[bits]:
        plane = blocks[:, :, first : first + width].reshape(-1, width)
        fields |= unpack_fields(plane, width, 32) << first
        first += width
    return fields.view(len(words), -1)[:, :count]


def pack_fields(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``[M, count]``, values below ``2**bits``, into int32 ``[M, word_count(count, bits)]``.

    This is the inverse of `unpack_fields`; spare bits are 0.
    """
    stream = pack_stream(fields, bits)
    words = stream.new_zeros(len(stream), 4 * word_count(fields.shape[1], bits))
    words[:, : stream.shape[1]] = stream
    return words.view(torch.int32)
