"""What the producers of frontier.py have in common: each is a script in an environment of its own.

Its argument is a `Task` in JSON, its result the directory `out`. It imports nothing of this package but for recipes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One model to quantize.

    `directory` and `gguf` hold the float model, `windows` the token ids to calibrate on, `length` a window, as JSON,
    `calibration` the same as text; `shared` is a folder for what several tasks of a model need.
    """

    directory: str
    gguf: str
    windows: str
    calibration: str
    length: int
    shared: str
    out: str
    threads: int
    settings: dict[str, Any]

    def read_windows(self) -> list[list[int]]:
        return json.loads(Path(self.windows).read_text(encoding="utf-8"))


def task() -> Task:
    """The task in the argument."""
    return Task(**json.loads(sys.argv[1]))
