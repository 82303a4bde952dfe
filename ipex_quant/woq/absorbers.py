"""Finding the module before a share group whose output channels can take the reciprocal of the group's scale.

Structure decides, not names: a module can if multiplying its output channels by powers of two, which rounds nothing,
multiplies the group's input channels by the same, and dividing these again leaves all that the block returns as it was,
to the last bit. Between a norm and q/k/v nothing happens; between v and o the attention mixes positions only, and
repeats heads; between up and down there is a product, or a ReLU.
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
"""Of two, one for each digit that a channel's number may have. Without 0, which is what a channel shows that does not
depend on the module, and negative ones, which would round the smallest float16 numbers."""


@dataclass(frozen=True)
class Absorber:
    """The module `name` of a block; its channel ``sources[k]`` multiplies channel k of a share group, none if -1.

    `width` is the number of its channels.
    """

    name: str
    width: int
    sources: torch.Tensor


def find_absorber(
    block: nn.Module, run: Callable[[], object], members: Sequence[str], candidates: Collection[str]
) -> Absorber | None:
    """The first of `candidates`, names of norms and linears, that can divide what the linears `members` read.

    ``run()`` runs `block` once and returns what it does. None when there is no such module.
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
        """Channels that may reach the group's inputs, each as often: all, or the last ones of a fused linear."""
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
        """Channel of a module that multiplies each input channel of the group, -1 for none; None if any does more.

        Each channel is multiplied by a power of two that tells its number, digit by digit.
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
        """Whether the members alone see it when channels of the module are multiplied."""
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
