"""Which tokens of a padded batch are computed, and which of them each one sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Tokens:
    """The T tokens of a batch ``[batch, length]`` that are computed, as rows ``[T, ...]``, sequence after sequence.

    `rows`, int64 ``[T]``, are their places in the flattened batch; None is all of it, in which `hidden`, bool ``[batch,
    length]``, may mark tokens whose results do not count. Either `mask`, bool or added to
    the scores, broadcasts to ``[batch, H, length, length]``, and all tokens are computed; or the queries of sequence b
    are the rows ``starts[b]`` to ``starts[b + 1]``, and its keys the rows ``key_starts[b]`` to ``key_starts[b + 1]`` of
    those in `keys`, int64; None is all. Starts are int64 ``[batch + 1]``.
    """

    batch: int
    length: int
    starts: torch.Tensor
    key_starts: torch.Tensor
    rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """The rows ``[T, ...]`` of the computed tokens of `x` ``[batch or 1, length, ...]``."""
        x = x.expand(self.batch, self.length, *x.shape[2:])
        if self.rows is None:
            return x.flatten(0, 1)
        if x.stride(0) == 0 and self.batch > 1:  # one row of positions for all sequences
            return x[0].index_select(0, self.rows % self.length)
        return x.flatten(0, 1).index_select(0, self.rows)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """`x` ``[T, K]`` as ``[batch, length, K]``, with 0 for tokens that are not computed, or `hidden`."""
        if self.rows is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.rows, x)
        x = x.unflatten(0, (self.batch, self.length))
        return x if self.hidden is None else x.masked_fill(self.hidden[..., None], 0)

    def select_keys(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of `x` ``[T, ...]`` that any token sees."""
        return x if self.keys is None else x.index_select(0, self.keys)

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Numbers of queries and of keys of each sequence."""
        return list(zip(self.starts.diff().tolist(), self.key_starts.diff().tolist(), strict=True))

    @cached_property
    def groups(self) -> dict[tuple[int, int], list[int]]:
        """The sequences of each pair of `lengths`."""
        groups: dict[tuple[int, int], list[int]] = {}
        for sequence, lengths in enumerate(self.lengths):
            groups.setdefault(lengths, []).append(sequence)
        return groups


def read_tokens(shape: Sequence[int], mask: torch.Tensor | None, unpad: bool) -> Tokens:
    """`Tokens` of a batch of `shape` ``[B, L]`` with the attention mask that a model was given.

    - None: every token sees all of its sequence.
    - ``[B, L]``: every token sees those that are not 0. With `unpad` only these are computed.
    - ``[B, L, L]``: a query sees the keys that are not 0. Every token is computed.
    - four dimensions that broadcast to ``[B, H, L, L]``: as transformers passes it on, bool or added to the scores.

    Raises ValueError for another shape.
    """
    batch, length = shape
    whole = torch.arange(batch + 1) * length
    if mask is None:
        return Tokens(batch, length, whole, whole)
    if mask.dim() == 4:
        return Tokens(batch, length, whole, whole, mask=mask)
    if mask.shape == (batch, length, length):
        return Tokens(batch, length, whole, whole, mask=mask.bool()[:, None])
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask: expected [{batch}, {length}], [{batch}, {length}, {length}] or four dimensions, "
            f"got {list(mask.shape)}"
        )
    real = mask.bool()
    if torch.compiler.is_compiling():  # traced code cannot depend on values
        return Tokens(batch, length, whole, whole, mask=real[:, None, None], hidden=~real if unpad else None)
    if not torch.jit.is_tracing() and bool(real.all()):
        return Tokens(batch, length, whole, whole)
    seen = real.flatten().nonzero().squeeze(1)
    starts = torch.nn.functional.pad(real.sum(dim=1).cumsum(0), (1, 0))
    if unpad:
        return Tokens(batch, length, starts, starts, rows=seen)
    return Tokens(batch, length, whole, starts, keys=seen)
