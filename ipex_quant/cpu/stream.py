"""`Stream`: a thread that is bound to cores of its own, and runs what it is given with the caller's torch state."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from .binding import bind


class Stream:
    """A thread that runs what is submitted, in order, on cores of its own, as many threads as cores.

    The thread lasts as long as the stream; a forked process starts its own. Raises OSError or RuntimeError if the
    system refuses the cores.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        self.cores = tuple(cores)
        self._start()

    def submit(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> Future[Any]:
        """Let the thread call `function` in the caller's torch state, dispatch modes and context."""
        if self._process != os.getpid():
            self._start()
        return self._executor.submit(contextvars.copy_context().run, _CallerState().call, function, args, kwargs or {})

    def _start(self) -> None:
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ipex_quant_stream")
        count = torch.get_num_threads()
        try:
            self._executor.submit(bind, self.cores).result()
        finally:
            torch.set_num_threads(count)  # binding also set how many threads new Python threads begin with


class _CallerState:
    """What torch keeps for each thread and a call depends on, as it is where this object is made."""

    def __init__(self) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.grad = torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled("cpu")
        self.autocast_dtype = torch.get_autocast_dtype("cpu")
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.modes = [mode for mode in _get_current_dispatch_mode_stack() if not mode.is_infra_mode()]

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call `function` in this state, which stays: every call of a stream sets its own."""
        # Not through torch.autocast, which would drop the casted weights of all streams and of the caller at its end.
        torch.set_autocast_enabled("cpu", self.autocast)
        torch.set_autocast_dtype("cpu", self.autocast_dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            # Not entered, which a mode may do but once, and which counts in flags of the process.
            for mode in self.modes:
                _push_mode(mode)
            try:
                return function(*args, **kwargs)
            finally:
                for _ in self.modes:
                    _pop_mode()
