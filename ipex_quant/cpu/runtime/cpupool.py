"""`CPUPool`, cores to compute on, and `pin`, which computes on them."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any, TypeVar

from ..binding import available_processors, bound
from ..topology import node_processors, one_a_core

F = TypeVar("F", bound=Callable[..., Any])


class CPUPool:
    """Cores to compute on: `core_ids`, or those of the NUMA node `node_id`, or all that this process may use.

    Core ids are the system's numbers of processors, in a list or range; where a core has several hardware threads,
    `node_id` and the default take one of each. Cores that this process may not use, because of a container, taskset
    or numactl, or that do not exist, are left out, with a warning if they were asked for by `core_ids`. Both arguments:
    `core_ids` counts, with a warning.

    Raises TypeError if `core_ids` is no sequence of int, and ValueError for an id that is negative or listed twice, for
    a node that does not exist, and if no core is left.
    """

    core_ids: list[int]

    def __init__(self, core_ids: Sequence[int] | None = None, node_id: int | None = None) -> None:
        if core_ids is not None:
            if node_id is not None:
                warnings.warn("CPUPool: node_id has no effect beside core_ids", stacklevel=2)
            asked = _checked(core_ids)
            usable = available_processors()
            self.core_ids = [core for core in asked if core in usable]
            if self.core_ids and len(self.core_ids) < len(asked):
                left_out = [core for core in asked if core not in usable]
                warnings.warn(
                    f"CPUPool: left out cores {left_out}, which do not exist or which this process may not use; "
                    f"computing on {self.core_ids}",
                    stacklevel=2,
                )
        elif node_id is not None:
            self.core_ids = one_a_core(available_processors().intersection(node_processors(node_id)))
        else:
            self.core_ids = one_a_core(available_processors())
        if not self.core_ids:
            what = f"core_ids {list(core_ids)}" if core_ids is not None else f"cores of node_id {node_id}"
            raise ValueError(f"CPUPool: this process may use none of the {what}, only {sorted(available_processors())}")

    @property
    def cpu_pool(self) -> CPUPool:
        """Itself: IPEX kept the cores in a native object of this name."""
        return self

    def get_core_list(self) -> list[int]:
        """`core_ids`."""
        return self.core_ids

    def __repr__(self) -> str:
        return f"CPUPool({self.core_ids})"

    def __reduce__(self) -> tuple[type[CPUPool], tuple[list[int]]]:
        return CPUPool, (self.core_ids,)  # another machine may lack some of them


class pin(ContextDecorator):  # noqa: N801  IPEX's name
    """Compute on the cores of `cpu_pool`: in a ``with`` block, or in every call of a function that this decorates.

    The calling thread, and the threads that torch's kernels use from it, run on these cores only, as many threads as
    cores; afterwards, also after an exception, affinity and number of threads are as before. Pins nest.

    Raises TypeError if `cpu_pool` is no CPUPool, and for a generator or coroutine function: it would leave its caller
    pinned while it is suspended. Put a ``with`` block inside, around what computes.
    """

    def __init__(self, cpu_pool: CPUPool) -> None:
        if not isinstance(cpu_pool, CPUPool):
            raise TypeError(f"pin: expected a CPUPool, got {type(cpu_pool).__name__}")
        self.cpu_pool = cpu_pool
        self._entered = _PerThread()

    def __call__(self, function: F) -> F:
        suspends = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in suspends):
            raise TypeError(
                f"pin: {function.__qualname__} is a generator or coroutine function, which would leave its caller "
                "pinned while it is suspended; use `with pin(...)` inside it, around what computes"
            )
        return super().__call__(function)

    def __enter__(self) -> pin:
        block = bound(self.cpu_pool.core_ids)
        block.__enter__()
        self._entered.blocks.append(block)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.blocks.pop().__exit__(*exception)


class _PerThread(threading.local):
    """The blocks of one `pin` that a thread is in, innermost last."""

    def __init__(self) -> None:
        self.blocks: list[AbstractContextManager[None]] = []


def _checked(core_ids: Sequence[int]) -> list[int]:
    if not isinstance(core_ids, Sequence) or not all(isinstance(c, int) for c in core_ids):
        raise TypeError(f"core_ids: expected a list or range of int, got {core_ids!r}")
    cores = list(core_ids)
    if any(core < 0 for core in cores) or len(set(cores)) < len(cores):
        raise ValueError(f"core_ids: expected different numbers from 0 on, got {cores}")
    return cores
