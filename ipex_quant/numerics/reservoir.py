"""Uniform random sampling of rows that arrive in batches, when their total number is not known."""

from __future__ import annotations

import torch


class Reservoir:
    """A uniform random sample of at most `capacity` of the rows added, in their order: `rows`, None at first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: torch.Tensor | None = None
        self._keys = torch.empty(0, dtype=torch.float32)

    def add(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        """Give each of `rows` ``[R, ...]`` a random key, and keep the `capacity` rows with the largest keys."""
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=generator, dtype=torch.float32)])
        kept = keys.argsort(descending=True, stable=True)[: self.capacity].sort().values
        old = len(self._keys)
        new = rows[kept[kept >= old] - old]
        self.rows = new if self.rows is None else torch.cat([self.rows[kept[kept < old]], new])
        self._keys = keys[kept]
