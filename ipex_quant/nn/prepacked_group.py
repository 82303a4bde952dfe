"""Linear layers that read one tensor, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .prepacked import Derived, PrepackedLinear, multiply_packed, pack_linear, versions


class LinearGroup:
    """Multiplies by the joined weights of its `members` when the first of them is called with an input.

    The others, called with the same tensor, find their results. If they are called with another, the group
    `is_together` no longer.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = list(members)
        self.is_together = True
        self._joined = Derived()
        self._last: _Results | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def result(self, index: int, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The result of member number `index`, in `dtype`."""
        last = self._last
        if last is not None and last.is_of(input, dtype):
            output = last.outputs.pop(index, None)
            if output is not None:
                if not last.outputs:
                    self._last = None
                return output
        elif last is not None:
            self.is_together = False
        outputs = dict(enumerate(self._compute(input, dtype)))
        output = outputs.pop(index)
        self._last = _Results(input, dtype, outputs) if self.is_together else None
        return output

    def _compute(self, input: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        weights = [member.weight for member in self.members]
        biases = [member.bias for member in self.members]
        sources = [*weights, *(bias for bias in biases if bias is not None)]
        weight, bias = self._joined.of(sources, dtype, lambda: _join(weights, biases, dtype))
        widths = [len(weight) for weight in weights]
        return [part.contiguous() for part in multiply_packed(input.to(dtype), weight, bias).split(widths, dim=-1)]


class _Results:
    """Results that members of a group have not asked for yet."""

    def __init__(self, input: torch.Tensor, dtype: torch.dtype, outputs: dict[int, torch.Tensor]) -> None:
        self._input = input  # kept, so that no other tensor becomes the same object
        self._key = (versions([input]), dtype)
        self.outputs = outputs

    def is_of(self, input: torch.Tensor, dtype: torch.dtype) -> bool:
        return input is self._input and self._key == (versions([input]), dtype)


def _join(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    packed = pack_linear(torch.cat([weight.to(dtype) for weight in weights]))
    if all(bias is None for bias in biases):
        return packed, None
    pairs = zip(weights, biases, strict=True)
    return packed, torch.cat([w.new_zeros(len(w), dtype=dtype) if b is None else b.to(dtype) for w, b in pairs])


class GroupedLinear(PrepackedLinear):
    """The forward of member number `index` of a `group`."""

    def __init__(self, module: nn.Module, group: LinearGroup, index: int) -> None:
        super().__init__(module)
        self.group = group
        self.index = index

    def _multiply(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if self.group.is_together:
            return self.group.result(self.index, input, dtype)
        return super()._multiply(input, weight, bias, dtype)
