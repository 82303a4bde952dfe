"""Packing of two 4-bit codes per byte, even column in the low nibble; and integers as bytes."""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes, uint8 ``[N, K]`` with values 0..15, into uint8 ``[N, ceil(K / 2)]``.

    With an odd K the last high nibble of every row is 0. Raises TypeError for another dtype and ValueError for another
    rank.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected dtype torch.uint8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected 2 dimensions [N, K], got shape {list(codes.shape)}")
    even = codes.shape[1] % 2 == codes.storage_offset() % 2 == codes.stride(0) % 2 == 0
    if even and codes.stride(1) == 1:
        pairs = codes.view(torch.int16)  # the even column in the low byte; all of it vectorizes
        return (pairs >> 4).bitwise_or_(pairs).bitwise_and_(255).to(torch.uint8)
    packed = codes[:, 0::2].clone()
    high = codes[:, 1::2]
    packed[:, : high.shape[1]] |= high << 4
    return packed


def unpack_nibbles(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Unpack uint8 ``[N, ceil(k / 2)]`` to 4-bit codes, uint8 ``[N, k]``: the inverse of `pack_nibbles`.

    Raises TypeError for another dtype and ValueError for another shape.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected dtype torch.uint8, got {packed.dtype}")
    if packed.dim() != 2 or packed.shape[1] != (k + 1) // 2:
        raise ValueError(f"packed: expected shape [N, {(k + 1) // 2}] for k = {k}, got {list(packed.shape)}")
    wide = torch.empty(packed.shape, dtype=torch.int16, device=packed.device).copy_(packed)
    return wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F).view(torch.uint8)[:, :k]


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Bytes of integers ``[..., K]``, lowest first: uint8 ``[..., K * itemsize]``, a view where possible."""
    words = words.contiguous()
    if words.dim() and words.stride(-1) != 1:  # torch calls a transposed [1, N] contiguous, but cannot view it
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)
