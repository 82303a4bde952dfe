"""Fields of 1 to 8 bits in a little-endian bit stream of int32 words: field i starts at bit ``bits * i``.

GPTQ's 2, 4 and 8 bit words and its 3 bit triples of words (32 values in 96 bits, some across two words) are all such
streams. Eight fields fill exactly `bits` bytes, so both directions are eight shifts over bytes, whatever the width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..numerics.nibbles import as_bytes

FIELDS = 8
"""Fields in one unit of `bits` bytes."""


PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes of fields of 2 to 8 bits, the lowest bits first."""


def word_count(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` fields of `bits`."""
    return -(-count * bits // 32)


def unpack_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack the fields of every row: int32 ``[M, word_count(count, bits)]`` to uint8 ``[M, count]``."""
    stream = as_bytes(words)
    if bits == 8:
        return stream[:, :count]
    units = -(-count // FIELDS)
    lacking = units * bits - stream.shape[1]
    stream = F.pad(stream, (0, lacking)) if lacking > 0 else stream  # a pad of nothing copies
    stream = stream[:, : units * bits].unflatten(1, (units, bits))
    fields = stream.new_empty(len(words), units, FIELDS)
    for field in range(FIELDS):
        byte, shift = divmod(field * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value |= stream[..., byte + 1] << (8 - shift)
        fields[..., field] = value & ((1 << bits) - 1)
    return fields.flatten(1)[:, :count]


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
    rows, count = fields.shape
    units = -(-count // FIELDS)
    fields = F.pad(fields, (0, units * FIELDS - count)).unflatten(1, (units, FIELDS))
    stream = fields.new_zeros(rows, units, bits)
    for field in range(FIELDS):
        byte, shift = divmod(field * bits, 8)
        stream[..., byte] |= fields[..., field] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= fields[..., field] >> (8 - shift)
    words = fields.new_zeros(rows, 4 * word_count(count, bits))
    width = min(words.shape[1], units * bits)
    words[:, :width] = stream.flatten(1)[:, :width]
    return words.view(torch.int32)
