"""The tuning loop, on neural-compressor's parts: a sampler draws from a config set, a monitor records and decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from .search import Search
from .trials import Trial, TrialRecord

logger = logging.getLogger("ipex_quant")


def run_trials(
    search: Search, measure: Callable[[Any, int], Trial], record: TrialRecord, is_over: Callable[[], bool]
) -> list[Trial]:
    """Measure the recipes of `search` and record their trials, until it ends, or ``is_over()`` after one of them.

    A trial that the record holds from an earlier run is not measured again. Raises ImportError without
    neural-compressor.
    """
    tuning = tuning_parts()

    class Config(tuning.BaseConfig):  # type: ignore[name-defined]
        """A recipe in a config set."""

        name = "ipex_quant_recipe"

        def __init__(self, recipe: Any) -> None:
            super().__init__(white_list=None)
            self.recipe = recipe

        @classmethod
        def get_config_set_for_tuning(cls) -> None:
            """The base class wants it; what is tried comes from the search."""

        @classmethod
        def register_supported_configs(cls) -> None:
            """The base class wants it."""

    class Monitor(tuning.TuningMonitor):  # type: ignore[name-defined]
        """Records trials, and ends the search by our criterion and the time."""

        def need_stop(self) -> bool:
            return is_over()

        def _print_trial_results_table(self, *_: Any) -> None:
            """The progress bar and the report show the trials."""

    class Sampler(tuning.Sampler):  # type: ignore[name-defined]
        """Draws what the search wants next, which depends on the trials so far."""

        def __init__(self, config_set: Any) -> None:
            self.config_set = config_set

        def __iter__(self) -> Iterator[int]:
            trial = None
            while True:
                try:
                    recipe = search.send(trial)
                except StopIteration:
                    return
                self.config_set.config_list.append(Config(recipe))
                yield len(self.config_set) - 1
                trial = record.trials[-1]

    monitor = Monitor(tuning.TuningConfig(config_set=[], sampler=Sampler))
    loader = tuning.ConfigLoader(config_set=[], sampler=Sampler, skip_verified_config=False)
    with tqdm(desc="tuning", unit="trial") as progress:
        for index, config in enumerate(loader):
            trial = record.recall(config.recipe.to_json()) or measure(config.recipe, index)
            record.add(trial)
            monitor.add_trial_result(index, trial.metric, config)
            logger.info(
                "trial %d: %s: loss %.4g, %s", index, trial.label, trial.loss, "met" if trial.met else "not met"
            )
            progress.update()
            progress.set_postfix_str(f"loss {min(t.loss for t in record.trials):.4g}")
            if monitor.need_stop():
                break
    search.close()
    return record.trials


def tuning_parts() -> Any:
    """neural-compressor's module of them; ImportError when it is not installed."""
    try:
        from neural_compressor.common import base_tuning
    except ImportError as error:
        raise ImportError(
            "autotune is built on neural-compressor's tuning parts; run `pip install ipex_quant[autotune]`"
        ) from error
    return base_tuning
