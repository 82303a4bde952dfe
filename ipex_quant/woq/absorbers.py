"""Finds the module before a share group whose output channels can absorb the reciprocal of the group's scale.

Runs of the block decide, not names. Multiplying the module's output channels by powers of two, which round nothing,
must multiply the group's input channels by the same powers; dividing the group's input by them must restore the block's
outputs bit for bit. A norm passes this test for q/k/v, which read its output; v for o, since attention only mixes
positions and repeats heads; up for down, with a product or a ReLU between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..nn.linears import is_linear, linear_shape

_EXPONENTS = torch.arange(1.0, 8.0)
"""Exponents of the powers of two that encode the digits of channel numbers. 0 is left out: it marks a channel that does
not depend on the module. Negative exponents are left out: they would round the smallest float16 numbers."""


@dataclass(frozen=True)
class Absorber:
    """The module `name` of a block, whose `width` output channels can absorb the scale of a share group.

    Output channel ``sources[k]``, int64 ``[K]``, scales the group's input channel k; -1 if that input is always 0.
    """

    name: str
    width: int
    sources: torch.Tensor


def find_absorber(
    block: nn.Module, run: Callable[[], object], members: Sequence[str], candidates: Collection[str]
) -> Absorber | None:
    """Find the first norm or linear of `candidates` that can absorb the scale of the share group `members`, or None.

    Names are those within `block`. ``run()`` runs `block` once and returns its outputs.
    """
    probe = _Probe(block, run, members)
    before = probe.observe()
    if before is None:
        return None
    for name in candidates:
        for channels in probe.channel_ranges(name):
            sources = probe.sources(name, channels, before)
            if sources is not None and probe.can_be_undone(name, sources, before):
                return Absorber(name, probe.width(name), sources)
    return None


@dataclass(frozen=True)
class _Observation:
    """Sum of ``|x|`` of every input channel of a share group, and all tensors that the block returns."""

    magnitude: torch.Tensor
    outputs: list[Any]


class _Probe:
    def __init__(self, block: nn.Module, run: Callable[[], object], members: Sequence[str]) -> None:
        self._block, self._run = block, run
        self._members = [block.get_submodule(name) for name in members]
        self._in_features = linear_shape(self._members[0])[1]

    def width(self, name: str) -> int:
        """Channels of the output of a norm or linear."""
        module = self._block.get_submodule(name)
        return linear_shape(module)[0] if is_linear(module) else len(module.weight)

    def channel_ranges(self, name: str) -> Iterator[range]:
        """Output channels to try as sources, in a number that divides K: all, or the last ones of a fused linear."""
        width, inputs = self.width(name), self._in_features
        counts = (width,) if width <= inputs else (inputs, (width - inputs) // 2)  # gate/up, q/k/v
        yield from (range(width - count, width) for count in counts if count and inputs % count == 0)

    def observe(
        self, name: str | None = None, factor: torch.Tensor | None = None, undo: torch.Tensor | None = None
    ) -> _Observation | None:
        """Run with the output of a module multiplied by `factor`, and the group's input divided by `undo`.

        None when the run did not reach the group.
        """
        total: torch.Tensor | None = None

        def multiply(module: nn.Module, args: object, output: Any) -> Any:
            return output * factor.to(output.dtype) if isinstance(output, torch.Tensor) else output

        def read(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            seen = x.detach().double().abs().flatten(0, -2).sum(0)
            total = seen if total is None else total + seen
            return x if undo is None else x / undo.to(x.dtype)

        with ExitStack() as stack:
            if name is not None:
                stack.callback(self._block.get_submodule(name).register_forward_hook(multiply).remove)
            for member in self._members:
                stack.enter_context(_input_replaced(member, read))
            outputs = tree_leaves(self._run())
        return None if total is None else _Observation(total, outputs)

    def sources(self, name: str, channels: range, before: _Observation) -> torch.Tensor | None:
        """Output channel of a module that scales each input channel of the group; -1 for inputs that are always 0.

        None unless exactly one of `channels` scales every other input, or if all inputs are 0. Each run multiplies the
        output channels by powers of two that encode one digit of their numbers.
        """
        base, count = len(_EXPONENTS), len(channels)
        numbers = torch.arange(count)
        found = torch.zeros(self._in_features, dtype=torch.long)
        reached = before.magnitude > 0
        place = 1
        while place < count or place == 1:
            factor = torch.ones(self.width(name), dtype=torch.float32)
            factor[channels.start :] = torch.exp2(_EXPONENTS[numbers // place % base])
            after = self.observe(name, factor)
            ratio = after.magnitude[reached] / before.magnitude[reached]
            digits = (ratio.log2()[:, None] - _EXPONENTS).abs()
            if not (digits.amin(1) < 1e-6).all():
                return None
            found[reached] += place * digits.argmin(1)
            place *= base
        found[~reached] = -1 - channels.start
        return None if (found >= count).any() or not reached.any() else found + channels.start

    def can_be_undone(self, name: str, sources: torch.Tensor, before: _Observation) -> bool:
        """Whether dividing the members' input undoes a scaling of the source channels in all outputs of the block."""
        used = sources[sources >= 0].unique()
        generator = torch.Generator().manual_seed(0)
        factor = torch.ones(self.width(name), dtype=torch.float32)
        factor[used] = torch.exp2(_EXPONENTS[torch.randint(len(_EXPONENTS), (len(used),), generator=generator)])
        undo = torch.where(sources >= 0, factor[sources], 1.0)
        after = self.observe(name, factor, undo)
        return len(after.outputs) == len(before.outputs) and all(map(_same, before.outputs, after.outputs))


def _same(left: object, right: object) -> bool:
    tensors = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return torch.equal(left, right) if tensors else left is right or left == right


@contextmanager
def _input_replaced(linear: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": replace(kwargs["input"])}

    handle = linear.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
