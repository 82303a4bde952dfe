"""`Report`: the result of a search as a table for terminals, as JSON, as HTML with plots, or as one SVG plot."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ..writing import check_writable, write_whole
from .plots import bar_plot, check_matplotlib, scatter_plot
from .trials import Trial, read_record

_HERE = Path(__file__).parent

_WRITERS = {".html": "to_html", ".json": "to_json_text", ".svg": "to_svg"}
"""Methods that make the content of a file, by its suffix."""


_COLUMNS = (
    *("", "candidate", "metric", "loss", "predicted", "met", "MB", "bytes a weight", "predicted ms", "measured ms"),
    "s",
)


@dataclass(frozen=True)
class Report:
    """The result of a search: the float model's metric, the criterion, all trials, and the sensitivity of every layer.

    `best` is the index of the trial that is the result, None if the search has not ended.
    """

    baseline: float
    criterion: str
    best: int | None
    trials: Sequence[Trial]
    sensitivity: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, record: str | os.PathLike) -> Report:
        """Read the file that `autotune` wrote as its `record`; OSError or ValueError if it cannot be read."""
        head, sensitivity, trials = read_record(record)
        if "baseline" not in head or not trials:
            raise ValueError(f"record: {record} holds no trials yet")
        if "criterion" not in head:
            raise ValueError(f"record: {record} is not a record of trials (it lacks the criterion)")
        return cls(head["baseline"], head["criterion"], head.get("best"), trials, sensitivity)

    @property
    def met(self) -> bool:
        """Whether there is a result, and it meets the criterion."""
        return any(trial.met for trial in self.trials if trial.index == self.best)

    @property
    def weight_only(self) -> bool:
        """Whether only weights are quantized."""
        return any(trial.recipe.get("kind") == "weight_only" for trial in self.trials)

    @property
    def pareto_front(self) -> list[Trial]:
        """The trials that no other trial beats in both size and metric, smallest first."""
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda trial: (trial.model_bytes, -trial.metric)):
            if not front or trial.metric > front[-1].metric:
                front.append(trial)
        return front

    def table(self) -> str:
        """A text table with a line for each trial; a star marks the result, a p the Pareto front."""
        label_width = max(len(trial.label) for trial in self.trials)
        head = f"    {'candidate':<{label_width}}{'metric':>12}{'loss':>10}{'predicted':>11}{'met':>5}"
        lines = [f"{head}{'MB':>10}{'B/weight':>10}{'predicted ms':>14}{'measured ms':>13}{'s':>8}"]
        front = self.pareto_front
        for trial in self.trials:
            marks = f"{'*' * (trial.index == self.best):<1}{'p' * (trial in front):<2}"
            lines.append(
                f"{marks} {trial.label:<{label_width}}{trial.metric:>12.5g}{trial.loss:>10.3g}"
                f"{_number(trial.predicted_loss):>11}{'yes' if trial.met else 'no':>5}"
                f"{trial.model_bytes / 1e6:>10.2f}{trial.bytes_per_weight:>10.4f}"
                f"{_number(trial.predicted_ms):>14}{_number(trial.measured_ms):>13}{trial.seconds:>8.1f}"
            )
        lines.append(f"float model: {self.baseline:.5g}; allowed loss: {self.criterion}; * the result, p Pareto front")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = {**vars(self), "trials": [asdict(trial) for trial in self.trials]}
        return {**values, "pareto_front": [trial.index for trial in self.pareto_front]}

    def to_json_text(self) -> str:
        """`to_json` as text."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def to_svg(self) -> str:
        """The plot of metric against size, with the Pareto front marked; ImportError without matplotlib."""
        points, front = (
            [(trial.model_bytes / 1e6, trial.metric) for trial in trials] for trials in (self.trials, self.pareto_front)
        )
        best = next((i for i, trial in enumerate(self.trials) if trial.index == self.best), None)
        return scatter_plot(points, front, best, self.baseline)

    def to_html(self) -> str:
        """A self-contained page with the trials and two plots; without matplotlib it warns and has no plots."""
        scatter = bars = ""
        try:
            scatter = self.to_svg()
            bars = bar_plot([(name, layer["error"]) for name, layer in self.sensitivity.items()])
        except ImportError as error:
            warnings.warn(f"report: it has no plots: {error}", stacklevel=4)
        values = {**vars(self), "summary": self._summary(), "head": _COLUMNS, "scatter": scatter, "bars": bars}
        return html_page(_HERE / "report.html", values)

    def write(self, path: str | os.PathLike) -> None:
        """Write the report to `path`: HTML, JSON, or SVG (the plot alone); ValueError for another suffix."""
        path = checked_report_path(path)
        write_whole(path, getattr(self, _WRITERS[path.suffix])())

    def _summary(self) -> str:
        text = f"{len(self.trials)} trials; float model {self.baseline:.5g}; allowed loss {self.criterion}."
        best = next((trial for trial in self.trials if trial.index == self.best), None)
        if best is None:
            return f"{text} The search has not ended."
        met = "which meets the criterion" if best.met else "which does not meet the criterion"
        return f"{text} Result: {best.label}, {best.metric:.5g}, a loss of {best.loss:.3g}, {met}."


def html_page(template: Path, values: Mapping[str, Any]) -> str:
    """A page of `values` by the jinja template in the file `template`, which gets the reports' `style` too."""
    page = Environment(autoescape=True, trim_blocks=True)
    page.filters |= {"number": _number, "note": _layer_note}
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    return page.from_string(template.read_text(encoding="utf-8")).render({**values, "style": style})


def checked_report_path(path: str | os.PathLike) -> Path:
    """`path` as a Path; ValueError unless it ends in .html, .json or .svg and its directory exists.

    Raises ImportError for .svg without matplotlib.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"report: expected a file that ends in {', '.join(_WRITERS)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"report: the directory of {path} does not exist; make it first")
    if path.suffix == ".svg":
        check_matplotlib()
    check_writable(path)
    return path


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _layer_note(layer: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in layer.items() if key != "error" and value is not None)
