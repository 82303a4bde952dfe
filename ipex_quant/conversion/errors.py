"""Errors that name the module they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(module: str, part: str = "") -> Iterator[None]:
    """Put the name of a `module`, and of a `part` of it, before the message of a TypeError or ValueError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(": ".join(filter(None, (module or "the model", part, str(error))))) from error
