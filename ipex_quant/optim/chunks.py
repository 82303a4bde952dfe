"""Passes over parameters in chunks that fit a cache, with their float32 values, gradients and optimizer state.

A chunk is a part of a large parameter or several small ones. What a step does with it, from joining the halves of its
values to splitting them again, happens before the next chunk is read from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .layout import Layout, aligned
from .masters import Master, Parts

ELEMENTS_PER_THREAD = 1 << 18
"""More do not fit the caches; fewer are done before a team of threads has started, ten times a chunk."""


@dataclass(frozen=True)
class Item:
    """A parameter that has a gradient, and its state, of which `first` is the first update.

    `state` has one value, as "step" is, or one for each element.
    """

    master: Master
    state: dict[str, torch.Tensor]
    first: bool = False

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.master.param.numel()

    @property
    def has_bfloat16_gradient(self) -> bool:
        """Whether the gradient is bfloat16, as that of a parameter of this dtype can be any."""
        assert self.master.param.grad is not None  # of an item
        return self.master.param.grad.dtype == torch.bfloat16

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all items of one pass have in common."""
        return type(self.master), self.master.param.dtype, self.first

    def pieces(self, limit: int) -> Iterator[Piece]:
        """The parameter in pieces of at most `limit` elements."""
        param, state = self.master.param, self.state
        layout = Layout(param)
        arrays = {name: value for name, value in state.items() if value.shape == param.shape and name != "step"}
        for name, value in arrays.items():
            if not layout.holds(value):
                arrays[name] = state[name] = aligned(value, param)
        assert param.grad is not None  # of an item
        columns = [[layout.flat(x)] for x in (param.grad, *self.master.tensors(), *arrays.values())]
        if self.numel > limit:
            columns = [list(x.split(limit)) for (x,) in columns]
        rest = {name: value for name, value in state.items() if name not in arrays}
        held = len(columns) - len(arrays)
        for grad, *row in zip(*columns, strict=True):
            yield Piece(tuple(row[: held - 1]), grad, rest | dict(zip(arrays, row[held - 1 :], strict=True)))


class Piece(NamedTuple):
    """Consecutive elements of an `Item`."""

    parts: Parts
    grad: torch.Tensor
    state: dict[str, torch.Tensor]


class Pass:
    """One pass over `items` of one kind, chunk by chunk; gradients are multiplied with `factor`.

    Iterating gives the pieces of a chunk and their values in float32, or float64 where the parameter is. With `store`,
    what the loop does to these values in place is stored before the next chunk.
    """

    def __init__(self, items: Sequence[Item], factor: float = 1.0, store: bool = True) -> None:
        self._items, self._factor, self._store = items, factor, store
        self._limit = ELEMENTS_PER_THREAD * torch.get_num_threads()
        self._room = min(self._limit, sum(item.numel for item in items))
        self._dtype = value_dtype(items[0].master.param)
        self._gradients: torch.Tensor | None = None

    def __iter__(self) -> Iterator[tuple[list[Piece], list[torch.Tensor]]]:
        kind = type(self._items[0].master)
        room = torch.empty(self._room, dtype=self._dtype)
        for pieces in self._chunks():
            parts = [piece.parts for piece in pieces]
            scratch = room[: _elements(pieces)]
            values = kind.read(parts, scratch)
            yield pieces, values
            if self._store:
                kind.write(parts, values, scratch)

    def gradients(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The gradients of a chunk in the dtype of values; they are for reading, until the next chunk."""
        given = [piece.grad for piece in pieces]
        if self._factor == 1.0 and all(grad.dtype == self._dtype for grad in given):
            return given
        if self._gradients is None:
            self._gradients = torch.empty(self._room, dtype=self._dtype)
        scratch = self._gradients[: _elements(pieces)]
        result = list(scratch.split([grad.numel() for grad in given]))
        torch._foreach_copy_(result, given)
        if self._factor != 1.0:
            scratch.mul_(self._factor)
        return result

    def _chunks(self) -> Iterator[list[Piece]]:
        chunk: list[Piece] = []
        size = 0
        for item in self._items:
            for piece in item.pieces(self._limit):
                if chunk and size + piece.grad.numel() > self._limit:
                    yield chunk
                    chunk, size = [], 0
                chunk.append(piece)
                size += piece.grad.numel()
        if chunk:
            yield chunk


def value_dtype(param: torch.Tensor) -> torch.dtype:
    """The dtype in which `param` is updated."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _elements(pieces: Sequence[Piece]) -> int:
    return sum(piece.grad.numel() for piece in pieces)
