"""Fields of 1 to 8 bits in a little-endian stream of bytes, one for each row: field i starts at bit ``bits * i``.

Eight fields fill exactly `bits` bytes, the low ones of an int64. Moving half of them at a time, in three steps, gives
each field a byte of its own, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .nibbles import unpack_nibbles

_FIELDS = 8
"""Fields in one unit of `bits` bytes."""

_HALVES = (4, 2, 1)
"""Neighbouring fields that are moved together, in the steps that spread them."""

_SLICE = 1 << 18
"""Elements that are packed or unpacked at once."""


def stream_bytes(count: int, bits: int) -> int:
    """Number of bytes that hold `count` fields of `bits`."""
    return -(-count * bits // 8)


def unpack_stream(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack the first `count` fields of every row: uint8 ``[M, >= stream_bytes(count, bits)]`` to ``[M, count]``."""
    if bits == 8:
        return stream[:, :count]
    if bits == 4:
        return unpack_nibbles(stream[:, : (count + 1) // 2], count)
    units = -(-count // _FIELDS)
    fields = stream.new_empty(len(stream), count)
    for own in _slices(*fields.shape):
        part = stream[own, : units * bits]
        part = F.pad(part, (0, units * bits - part.shape[1])).unflatten(1, (units, bits))
        words = part.new_zeros(len(part), units, _FIELDS)
        words[..., :bits] = part
        spread = words.view(torch.int64)
        for half in _HALVES:
            low = _low_halves(half, bits)
            high = spread.bitwise_and(low << half * bits).bitwise_left_shift_(half * (8 - bits))
            spread.bitwise_and_(low).bitwise_or_(high)
        fields[own] = words.flatten(1)[:, :count]
    return fields


def pack_stream(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``[M, count]``, values below ``2**bits``, into uint8 ``[M, stream_bytes(count, bits)]``.

    This is the inverse of `unpack_stream`; spare bits are 0.
    """
    if bits == 8:
        return fields
    rows, count = fields.shape
    units = -(-count // _FIELDS)
    stream = fields.new_empty(rows, stream_bytes(count, bits))
    for own in _slices(rows, count):
        words = fields.new_zeros(own.stop - own.start, units * _FIELDS)
        words[:, :count] = fields[own]
        joined = words.view(torch.int64)
        for half in reversed(_HALVES):
            low = _low_halves(half, bits)
            high = joined.bitwise_and(low << half * 8).bitwise_right_shift_(half * (8 - bits))
            joined.bitwise_and_(low).bitwise_or_(high)
        stream[own] = words.unflatten(1, (units, _FIELDS))[..., :bits].flatten(1)[:, : stream.shape[1]]
    return stream


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows whose elements fit the caches, where the steps take less than half of the time."""
    step = max(1, _SLICE // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _low_halves(half: int, bits: int) -> int:
    """Mask of the lower `half` fields of every run of twice as many, which has as many bytes as fields."""
    run = (1 << half * bits) - 1
    return sum(run << start for start in range(0, 64, 2 * half * 8))
