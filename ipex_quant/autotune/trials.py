"""`TrialRecord`: the trials of a search, kept in a file that survives a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..reading import parse_json, shown
from ..writing import check_writable, write_whole

VERSION = 2


@dataclass(frozen=True)
class Trial:
    """A measured candidate.

    - `loss` is how much worse `metric` is than the float model's, and `predicted_loss` what was expected before, None
      where nothing was. `met` says whether the criterion and the budget allow that.
    - `model_bytes` counts all parameters and buffers; `bytes_per_weight` is the average over quantized layers and
      linear layers in float.
    - `predicted_ms` is the time to read the weights of a decode step from memory, its lower bound, and `measured_ms`
      the time of a decode step; both are None for models that do not generate.
    - `seconds` is the duration of the trial.
    """

    index: int
    recipe: dict[str, Any]
    label: str
    metric: float
    loss: float
    predicted_loss: float | None
    met: bool
    model_bytes: int
    bytes_per_weight: float
    predicted_ms: float | None
    measured_ms: float | None
    seconds: float


class TrialRecord:
    """The trials of a search, in order, also saved as JSON lines to `path` if given; each save replaces the file.

    The first line holds the `identity` of the search and the float model's metric, the last one the sensitivity of the
    layers. The trials of an existing file can be recalled with `recall`. Raises ValueError if the file is no record or
    belongs to another search.
    """

    def __init__(self, path: str | os.PathLike | None, identity: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.head: dict[str, Any] = {"type": "search", "version": VERSION, **identity}
        self.sensitivity: dict[str, Any] = {}
        self.trials: list[Trial] = []
        self._earlier: dict[str, Trial] = {}
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ValueError(f"record: the directory of {self.path} does not exist; make it first")
        check_writable(self.path)
        if self.path.exists():
            self._resume(self.path)

    @property
    def baseline(self) -> float | None:
        """The float model's metric, once it is known."""
        return self.head.get("baseline")

    def set_baseline(self, metric: float, seconds: float) -> None:
        """Record the float model's metric, and the seconds to measure it."""
        self.head |= {"baseline": metric, "baseline_seconds": seconds}
        self._write()

    def recall(self, candidate: Mapping[str, Any]) -> Trial | None:
        """The trial of the same candidate in an earlier run; None if there is none."""
        return self._earlier.get(json.dumps(candidate))

    def add(self, trial: Trial) -> None:
        """Append a trial."""
        self.trials.append(trial)
        self._write()

    def finish(self, best: Trial, sensitivity: Mapping[str, Any]) -> None:
        """Record which trial is the result, and the sensitivity of the layers."""
        self.head["best"] = best.index
        self.sensitivity = dict(sensitivity)
        self._write()

    @property
    def seconds(self) -> float:
        """Seconds of the baseline and of all trials, also those of earlier runs."""
        return self.head.get("baseline_seconds", 0.0) + sum(trial.seconds for trial in self.trials)

    def _resume(self, path: Path) -> None:
        head, _, trials = read_record(path)
        for key, value in self.head.items():
            if head.get(key) != value:
                raise ValueError(
                    f"record: {path} is of another search: its {key} is {head.get(key)!r}, not {value!r}; delete it or "
                    "give another path"
                )
        self.head |= {key: head[key] for key in ("baseline", "baseline_seconds") if key in head}
        self._earlier = {json.dumps(trial.recipe): trial for trial in trials}

    def _write(self) -> None:
        if self.path is None:
            return
        # Trials of an earlier run that this run has not reached yet are kept, in case it is killed.
        done = {json.dumps(trial.recipe) for trial in self.trials}
        later = [trial for key, trial in self._earlier.items() if key not in done] if "best" not in self.head else []
        lines = [self.head, *({"type": "trial", **asdict(trial)} for trial in (*self.trials, *later))]
        if self.sensitivity:
            lines.append({"type": "sensitivity", "layers": self.sensitivity})
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def read_record(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any], list[Trial]]:
    """Head, sensitivity of the layers and trials of a record; OSError or ValueError when it cannot be read."""
    head: dict[str, Any] = {}
    sensitivity: dict[str, Any] = {}
    trials = []
    try:
        for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
            line = parse_json(text)
            kind = line.pop("type") if isinstance(line, dict) and "type" in line else None
            if kind not in ("search", "trial", "sensitivity") or (number == 0) != (kind == "search"):
                raise ValueError(f"line {number + 1} is a {shown(kind)}")
            if kind == "search":
                head = {"type": kind, **_checked(line, _HEAD, partly=True)}
            elif kind == "sensitivity":
                sensitivity = _checked(line, {"layers": _layers})["layers"]
            else:
                trials.append(Trial(**_checked(line, _TRIAL)))
        if not head:
            raise ValueError("it is empty")
        if "best" in head and head["best"] not in [trial.index for trial in trials]:
            raise ValueError(f"best: there is no trial {head['best']}")
    except ValueError as error:
        raise ValueError(f"record: {path} is not a record of trials ({error})") from error
    return head, sensitivity, trials


# ------------------------------------------------------------------------------------------------------ what lines hold
def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_duration(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _layers(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    notes = [note for layer in value.values() if isinstance(layer, dict) for note in layer.values()]
    known = all(note is None or _is_number(note) or _is_text(note) for note in notes)
    return known and all(isinstance(layer, dict) and _is_number(layer.get("error")) for layer in value.values())


_HEAD: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: value == VERSION and _is_count(value),
    "baseline": _is_number,
    "baseline_seconds": _is_duration,
    "best": _is_count,
}
_TRIAL: dict[str, Callable[[Any], bool]] = {
    "index": _is_count,
    "recipe": lambda value: isinstance(value, dict),
    "label": _is_text,
    "metric": _is_number,
    "loss": _is_number,
    "predicted_loss": lambda value: value is None or _is_number(value),
    "met": lambda value: isinstance(value, bool),
    "model_bytes": _is_count,
    "bytes_per_weight": _is_duration,
    "predicted_ms": lambda value: value is None or _is_duration(value),
    "measured_ms": lambda value: value is None or _is_duration(value),
    "seconds": _is_duration,
}


def _checked(line: dict[str, Any], checks: Mapping[str, Callable[[Any], bool]], partly: bool = False) -> dict[str, Any]:
    """`line`, if its values pass `checks`; ValueError if not, or, unless `partly`, if its keys differ."""
    if not partly and line.keys() != checks.keys():
        raise ValueError(f"expected {sorted(checks)}, got {shown(sorted(line))}")
    for name, check in checks.items():
        if name in line and not check(line[name]):
            raise ValueError(f"{name}: got {shown(line[name])}")
    return line
