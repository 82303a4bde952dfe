"""Reading untrusted JSON files; bad ones raise a short ValueError."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file in UTF-8; ValueError for anything else, OSError for a file that cannot be read."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError if it is not valid JSON or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:  # which is no ValueError
        raise ValueError("it is nested too deeply") from None


def shown(value: Any) -> str:
    """The repr of a value for an error message, shortened if it is long or nested."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother = 100, 300
_SHORT.maxlong = 40
