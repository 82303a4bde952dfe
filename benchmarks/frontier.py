"""Size against accuracy: this package's recipes and the quantizers of its peers, on the same models and texts.

Every producer gets the same float directory and the same calibration windows, and writes a model whose weights are
dequantized and computed in float32 in one program (frontier_measure.py), so that they are compared by their weights
alone. `make bench-frontier` installs the peers, each in an environment of its own. What was produced is measured once:
records are kept in `build/frontier/MODEL/records`, and a rerun goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from frontier_candidates import OURS, PRODUCERS, Candidate, candidates
from frontier_html import page
from frontier_measure import Predictor, measure
from frontier_models import BUILD, NAMES, Model, clear, prepare
from frontier_report import print_comparison, print_table
from machine import ROOT, describe
from produce import Task
from rounds import write_json
from tqdm import tqdm

from ipex_quant import data
from ipex_quant.writing import write_whole


def produce(candidate: Candidate, model: Model, out: Path, threads: int, limit: float) -> float:
    """Run a producer, and return its seconds; RuntimeError with the end of its log if it fails."""
    producer = PRODUCERS[candidate.producer]
    python = sys.executable
    if producer.environment is not None:
        folder = BUILD / producer.environment
        if not (folder / ".stamp").is_file():
            raise RuntimeError(f"not installed: {_last_line(BUILD / f'{producer.environment}.log')}")
        python = str(folder / "bin" / "python")
    task = Task(
        **{name: str(getattr(model, name)) for name in ("directory", "gguf", "windows", "calibration")},
        length=model.length,
        shared=str(model.folder),
        out=str(out),
        threads=threads,
        settings=candidate.settings,
    )
    log = out.with_suffix(".log")
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [python, str(ROOT / "benchmarks" / producer.script), json.dumps(asdict(task))],
                **{"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "timeout": limit},
                cwd=model.folder,
                env=os.environ | variables,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {limit:.0f} s") from None
    if status:
        raise RuntimeError(f"exit status {status}: {_last_line(log)}")
    return time.perf_counter() - start


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    errors = [line for line in lines if "error" in line.lower()]
    return ([*filter(None, errors or lines)] or [f"{log} is missing or empty"])[-1][:200]


class Records:
    """The records of a model, one file for each candidate; they hold for one pair of texts."""

    def __init__(self, model: Model, tokens: int) -> None:
        self.folder = model.folder / "records"
        self.folder.mkdir(exist_ok=True)
        texts = model.windows.read_text(encoding="utf-8") + model.text
        self.texts = f"{hashlib.sha256(texts.encode()).hexdigest()[:12]}, {tokens} tokens"

    def path(self, candidate: Candidate) -> Path:
        settings = json.dumps([candidate.settings, self.texts], sort_keys=True)
        name = "".join(c if c.isalnum() else "-" for c in f"{candidate.producer} {candidate.name}")
        return self.folder / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.json"

    def read(self, candidate: Candidate) -> dict[str, Any] | None:
        path = self.path(candidate)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run(
    candidate: Candidate, model: Model, reference: Predictor, records: Records, options: argparse.Namespace
) -> dict[str, Any]:
    """The record of a candidate, which has an "error" if it failed."""
    path = records.path(candidate)
    out = path.with_suffix("")
    record: dict[str, Any] = {"model": model.name, "producer": candidate.producer, "name": candidate.name}
    try:
        clear(out)
        seconds = produce(candidate, model, out, options.threads, options.limit)
        record |= measure(model, reference, out, options.tokens, candidate.producer == OURS)
        record["seconds"] = round(seconds, 1)
    except (RuntimeError, ValueError, OSError) as error:
        record["error"] = " ".join(str(error).split())[:300]
    if not options.keep:
        clear(out)
    write_json(path, record)
    return record


def selected(options: argparse.Namespace) -> list[Candidate]:
    """The candidates whose names match a pattern in `--only`."""
    found = [each for each in candidates(options.producers) if each.quick or not options.quick]
    return [each for each in found if any(fnmatch.fnmatch(each.name.lower(), p.lower()) for p in options.only)]


def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of all selected candidates on a model."""
    calibration, text, source = texts(options)
    model = prepare(name, options.packages, calibration, text)
    records = Records(model, options.tokens)
    found, reference = [], None
    for candidate in tqdm(selected(options), desc=name):
        record = records.read(candidate)
        if record is None and options.no_run:
            continue
        if record is None or ("error" in record and options.retry):
            reference = reference or Predictor(model.load())
            record = run(candidate, model, reference, records, options)
            tqdm.write(" ".join(f"{key}={value}" for key, value in record.items()))
        found.append(record | {"texts": source})
    return found


def texts(options: argparse.Namespace) -> tuple[str, str, str]:
    """The calibration text, the evaluation text, and where they are from."""
    calibration = data.calibration_text() if options.calibration is None else _read(options.calibration)
    text = data.held_out_text() if options.text is None else _read(options.text)
    paths = [path for path in (options.calibration, options.text) if path is not None]
    return calibration, text, ", ".join(path.stem for path in paths) or "Python's documentation"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def merged(path: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`records`, and those of other candidates that the JSON file has."""
    old = json.loads(path.read_text(encoding="utf-8"))["frontier"] if path.is_file() else []
    keys = ("model", "producer", "name")
    return list({tuple(record[key] for key in keys): record for record in (*old, *records)}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--producers", nargs="+", choices=PRODUCERS, default=list(PRODUCERS))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="candidates with such names")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes on a small model")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default: Python's documentation")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: what the embedded model has not seen")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, that are predicted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=7200, metavar="S", help="seconds for a candidate")
    parser.add_argument("--packages", type=Path, help="where the packages of the models are installed")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--no-run", action="store_true", help="show only what was measured before")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models, in build/frontier")
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--html", type=Path, help="where to write a page of all that --json holds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe(options.threads)
    shown: list[dict[str, Any]] = []
    for name in options.models:
        records = measured(name, options)
        if not records:
            continue
        print_table(records)
        print_comparison(records, OURS)
        shown += records
        if options.json is not None:
            write_json(options.json, {"machine": machine, "frontier": merged(options.json, records)})
    if options.html is not None:
        write_whole(options.html, page(shown if options.json is None else merged(options.json, shown)))


if __name__ == "__main__":
    main()
