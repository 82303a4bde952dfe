"""`Tuning`: run `autotune` on the settings that a recipe leaves open."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import evaluation
from ..autotune import Report, TuningOptions, WeightOnlySpace, tune
from ..quantization import WoqWeightDtype, convert
from .apply import calibration_data
from .recipe import Awq, Gptq, Recipe, SmoothQuant, Static, WeightOnly

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..conversion.calibration_text import Source

_ALGORITHMS = {"gptq": Gptq, "awq": Awq}


@dataclass(frozen=True)
class Tuning:
    """Runs `autotune` around `recipe`, calibrating on `samples` windows of `sequence_length` tokens."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    samples: int = 100
    sequence_length: int = 512

    def calibration(self, source: Source | None = None, column: str | None = None) -> DataLoader:
        """The windows to calibrate on, from `calibration_data`."""
        settings = Static(self.samples, self.sequence_length)
        return calibration_data(replace(self.recipe, settings=settings), self.tokenizer, source, column)

    def perplexity(self, text: str, max_tokens: int) -> Callable[[nn.Module], float]:
        """A metric of a causal language model: its negative perplexity on the beginning of `text`."""
        return lambda model: -evaluation.perplexity(model, self.tokenizer, text, self.sequence_length, max_tokens)

    def run(
        self,
        model: nn.Module,
        calibration: DataLoader | Collection[Any],
        eval_func: Callable[[nn.Module], float] | None,
        **options: Any,
    ) -> tuple[nn.Module, Report]:
        """Tune a copy of `model`; return the quantized model and the report.

        `options` are those of `autotune`; without an `eval_func` its default metric is used.
        """
        arguments = {**tuning_arguments(self.recipe), **options}
        tuned, report = tune(
            model, calibration, TuningOptions(eval_func=eval_func, sampling_sizes=[self.samples], **arguments)
        )
        return (tuned if isinstance(self.recipe.settings, WeightOnly) else convert(tuned)), report


def tuning_arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `autotune` for tuning around `recipe`.

    For SmoothQuant they try "auto" and the recipe's alpha, for other static recipes no smoothing. For weight-only
    recipes they fix the dtype (and INT8 for layers that need it), the compute mode and the algorithm (or "rtn"); group
    sizes and zero points are tuned. Modules that the recipe skips stay in float. Raises ValueError for a dynamic
    recipe, which has nothing to tune.
    """
    settings = recipe.settings
    fp32 = {"weight": {"dtype": ["fp32"]}}
    arguments: dict[str, Any] = {"op_type_dict": {f"(?:{pattern}).*": fp32 for pattern in recipe.skip} or None}
    if isinstance(settings, (SmoothQuant, Static)):
        alphas = ["auto", settings.alpha] if isinstance(settings, SmoothQuant) else [None]
        return {**arguments, "smoothquant_args": {"alpha": alphas}}
    if not isinstance(settings, WeightOnly):
        raise ValueError(f"recipe {recipe.name}: expected a static or weight-only one; this one has nothing to tune")
    space = WeightOnlySpace(
        weight_dtypes=[settings.weight_dtype, WoqWeightDtype.INT8],
        algorithms=[*(name for name, kind in _ALGORITHMS.items() if isinstance(settings, kind)), "rtn"],
        lowp_modes=[settings.lowp_mode],
        act_quant_mode=settings.act_quant_mode,
    )
    return {**arguments, "quantization_config": space}
