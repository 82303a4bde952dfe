"""Binding the calling thread, with the team that torch's kernels run on, to processors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .. import ops

_available_outside: ContextVar[frozenset[int] | None] = ContextVar("available_outside", default=None)
"""In a `bound` block: what was available before the outermost one."""


def available_processors() -> frozenset[int]:
    """The processors that this thread may use, also while it is bound to some of them.

    That is what the container, taskset or numactl leave, also on a machine with more.
    """
    return _available_outside.get() or frozenset(os.sched_getaffinity(0))


@contextmanager
def bound(processors: Sequence[int]) -> Iterator[None]:
    """Bind the calling thread and its team to `processors`, one thread each; afterwards all is as before.

    Every thread may run on any of the processors, as may those that are started within: OpenMP ends and starts threads
    of a team as sizes of parallel regions change, and one bound to its starter's processor alone would be stuck behind
    it. Raises OSError or RuntimeError, with nothing changed, if the system refuses.
    """
    available, count, team = available_processors(), torch.get_num_threads(), ops.team_affinity()
    own = os.sched_getaffinity(0)
    try:
        bind(processors)
        token = _available_outside.set(available)
        try:
            yield
        finally:
            _available_outside.reset(token)
    finally:
        os.sched_setaffinity(0, own)  # before the team grows: new threads inherit it
        _set_thread_count(count)
        ops.set_team_affinity(team)


def bind(processors: Sequence[int]) -> None:
    """Bind the calling thread and its team to `processors`, one thread each, for good.

    Raises OSError or RuntimeError if the system refuses.
    """
    os.sched_setaffinity(0, processors)
    _set_thread_count(len(processors))
    ops.bind_team(processors)


def _set_thread_count(count: int) -> None:
    if count != torch.get_num_threads():  # setting it empties oneDNN's cache of kernels
        torch.set_num_threads(count)
