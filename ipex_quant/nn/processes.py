"""Sending objects to other processes of this machine, with their packed weights in shared memory.

Pickles hold plain weights, since another machine or version may read them. Between processes these would be lost: torch
passes tensors as file descriptors, which do not outlive tensors that were made only for the pickle.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any


def share_with_processes(cls: type) -> None:
    """Let `Process`, `Queue` and the like send objects of `cls` as their `process_state`, which becomes `__dict__`."""
    ForkingPickler.register(cls, _reduce)


def _reduce(shared: Any) -> tuple[Any, ...]:
    # The state is set after the object exists, since it may refer to the object.
    return object.__new__, (type(shared),), shared.process_state(), None, None, _set_state


def _set_state(shared: Any, state: dict[str, Any]) -> None:
    shared.__dict__.update(state)
