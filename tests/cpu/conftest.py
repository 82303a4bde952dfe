"""Threads and their processors, as the system and not this package tells them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def main_thread_unchanged():
    """No test leaves the main thread, or the threads that start after it, bound or with another number of threads."""
    processors, count = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    assert os.sched_getaffinity(0) == processors
    assert torch.get_num_threads() == count
    assert in_new_thread(torch.get_num_threads) == count


@pytest.fixture
def new_thread() -> Callable[..., Any]:
    """Calls a function in a thread that has neither a team nor a number of threads yet."""
    return in_new_thread


def in_new_thread(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as executor:
        count = torch.get_num_threads()
        try:
            return executor.submit(function, *args).result()
        finally:
            torch.set_num_threads(count)


@pytest.fixture
def threads() -> Callable[[], dict[int, set[int]]]:
    """The processors of every thread of this process, by its id."""
    return threads_of_process


def threads_of_process() -> dict[int, set[int]]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[int(task.name)] = os.sched_getaffinity(int(task.name))
    return found


@pytest.fixture
def processors() -> list[int]:
    """What this process may use: one processor on the smallest machine, many on others."""
    return sorted(os.sched_getaffinity(0))
