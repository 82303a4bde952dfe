"""Matrices of 4-bit fields, transposed in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .fakes import check_shape, register_fake
from .library import native

_transpose = native.transpose_nibbles.default


def transpose_nibbles(words: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Transpose the nibbles of int32 `words` ``[M, W]``: uint8 ``[8 * W, ceil(M / 2)]``, packed as by `pack_nibbles`.

    Nibble i of word w, from the low bits on, of all M rows is row ``8 * w + order[i]`` of the result. Raises
    RuntimeError for another dtype or rank, words that are not contiguous, and an `order` that is no permutation of
    0..7.
    """
    return _transpose(words, order)


@register_fake("transpose_nibbles")
def _(words, order):
    check_shape("words", words, "[M, W]")
    return words.new_empty((8 * words.shape[1], (words.shape[0] + 1) // 2), dtype=torch.uint8)
