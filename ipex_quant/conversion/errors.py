"""`naming`: put the name of a module into error messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(module: str, part: str = "") -> Iterator[None]:
    """Prefix the message of a TypeError or ValueError with the name of a `module`, and of a `part` of it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(": ".join(filter(None, (module or "the model", part, str(error))))) from error
