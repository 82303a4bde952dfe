"""`Task`: a module that runs asynchronously on its own cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from ..stream import Stream
from .cpupool import CPUPool


class Task:
    """Calls of `module`, a module or function, on the cores of `cpu_pool`, in a thread of the task's own.

    A call returns at once, with a `TaskFuture`; calls run in order. They run in the caller's grad mode, inference mode
    and autocast state, and see tensors as they are when they run, not when they are submitted. A copy, by
    `copy.deepcopy` or pickle, has a thread of its own.

    Raises TypeError if `module` cannot be called or `cpu_pool` is no CPUPool.
    """

    def __init__(self, module: Callable[..., Any], cpu_pool: CPUPool) -> None:
        if not callable(module):
            raise TypeError(f"Task: expected a module or function, got {type(module).__name__}")
        if not isinstance(cpu_pool, CPUPool):
            raise TypeError(f"Task: expected a CPUPool, got {type(cpu_pool).__name__}")
        self.module = module
        self.cpu_pool = cpu_pool
        self._stream = Stream(cpu_pool.core_ids)

    def __call__(self, *args: Any, **kwargs: Any) -> TaskFuture:
        """Submit a call and return its future."""
        return TaskFuture(self._stream.submit(_call_alone, (self.module, args, kwargs)))

    def run_sync(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module on the task's cores, after what was submitted before, and return its result."""
        return self(*args, **kwargs).get()

    def __reduce__(self) -> tuple[type[Task], tuple[Callable[..., Any], CPUPool]]:
        return Task, (self.module, self.cpu_pool)


class TaskFuture:
    """The result of a call of a `Task`, once there is one."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the call, at most `timeout` seconds, and return its result or raise its exception.

        Raises TimeoutError (`concurrent.futures.TimeoutError` before Python 3.11) if it takes longer.
        """
        return self._future.result(timeout)

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._future.done()


def _call_alone(module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return module(*args, **kwargs)
    finally:
        if torch.is_autocast_enabled("cpu"):
            # The caller may have left its autocast block meanwhile: casted weights must not outlive a change of them.
            torch.clear_autocast_cache()
