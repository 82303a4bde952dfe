"""Two calls interleaved on purpose: what a scheduler may do to threads, without leaving it to chance."""

import sys
from collections.abc import Callable, Collection, Iterator
from itertools import count
from types import CodeType
from typing import Any

Call = Callable[[], Any]


def interleavings(
    prepare: Callable[[], tuple[Call, Call]], where: Collection[CodeType], event: str = "opcode"
) -> Iterator[tuple[Any, Any]]:
    """Results of two calls, of which the second interrupts the first before its first step in the code `where`, then
    its second, and so on, as long as there are so many. A step is an "opcode" or a "line".

    `prepare` makes the calls, anew every time.
    """
    for index in count():
        results = _interrupted_at(index, *prepare(), where, event)
        if results is None:
            return
        yield results


def _interrupted_at(
    index: int, call: Call, other: Call, where: Collection[CodeType], event: str
) -> tuple[Any, Any] | None:
    left, others = index, []

    def local(frame: Any, happened: str, argument: Any) -> Any:
        nonlocal left
        if happened == event:
            if left == 0:
                others.append(other())
            left -= 1
        return local

    def trace(frame: Any, happened: str, argument: Any) -> Any:
        if frame.f_code not in where:
            return None
        frame.f_trace_opcodes = event == "opcode"
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(before)
    return (result, others[0]) if others else None


def codes_of(*classes: type) -> frozenset[CodeType]:
    """The code of all methods of `classes`."""
    functions = [getattr(each, "fget", each) for cls in classes for each in vars(cls).values()]
    return frozenset(function.__code__ for function in functions if hasattr(function, "__code__"))
