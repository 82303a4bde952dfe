"""The processors that the threads of torch's team run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import isa  # noqa: F401  loads the native library
from .fakes import register_fake

MAX_PROCESSORS = 8192
"""What a Linux kernel can be configured for at most."""

_exchange = torch.ops.ipex_quant.exchange_affinity.default


def team_affinity() -> torch.Tensor:
    """The processors of each thread of the calling thread's team, bool ``[threads, MAX_PROCESSORS]``.

    The team is the calling thread, first, and the threads that torch's kernels start from it: as many as
    ``torch.get_num_threads()``. Raises RuntimeError if the system does not tell.
    """
    return set_team_affinity(torch.zeros(torch.get_num_threads(), MAX_PROCESSORS, dtype=torch.bool))


def set_team_affinity(table: torch.Tensor) -> torch.Tensor:
    """Bind each thread of the calling thread's team to the processors in its row of `table`; return the table before.

    `table` is as `team_affinity` returns it; threads with an empty row stay as they are. Raises RuntimeError if
    `table` does not have a row for each thread, or if the system refuses one.
    """
    return _exchange(table)


def bind_team(processors: Sequence[int]) -> torch.Tensor:
    """Let all threads of the calling thread's team run on any of `processors`; return `team_affinity` before.

    Raises RuntimeError if the system refuses, and IndexError for a number that no processor can have.
    """
    table = torch.zeros(torch.get_num_threads(), MAX_PROCESSORS, dtype=torch.bool)
    table[:, list(processors)] = True
    return set_team_affinity(table)


@register_fake("exchange_affinity")
def _(table):
    return torch.empty_like(table)
