"""The tuning loop: measures the candidates of a search and records their trials."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .search import Search
from .trials import Trial, TrialRecord

logger = logging.getLogger("ipex_quant")


def run_trials(
    search: Search, measure: Callable[[Any, int], Trial], record: TrialRecord, is_over: Callable[[], bool]
) -> list[Trial]:
    """Measure the candidates of `search` and record their trials, until it ends or ``is_over()`` is true after a trial.

    A candidate that the record holds from an earlier run is not measured again.
    """
    trial = None
    with tqdm(desc="tuning", unit="trial") as progress:
        while True:
            try:
                candidate = search.send(trial)
            except StopIteration:
                return record.trials
            index = len(record.trials)
            trial = record.recall(candidate.to_json()) or measure(candidate, index)
            record.add(trial)
            logger.info(
                "trial %d: %s: loss %.4g, %s", index, trial.label, trial.loss, "met" if trial.met else "not met"
            )
            progress.update()
            progress.set_postfix_str(f"loss {min(t.loss for t in record.trials):.4g}")
            if is_over():
                search.close()
                return record.trials
