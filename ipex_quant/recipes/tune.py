"""Tuning around a recipe: what it leaves open is what `autotune` looks for."""

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
    """Tunes around `recipe` with windows of `sequence_length` tokens, `samples` of them to calibrate on."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    samples: int = 100
    sequence_length: int = 512

    def calibration(self, source: Source | None = None, column: str | None = None) -> DataLoader:
        """The windows to calibrate on, as `calibration_data` finds them."""
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
        """Tune a copy of `model`; the quantized result, and the report.

        `options` are those of `autotune`, whose metric counts without an `eval_func`.
        """
        arguments = {**tuning_arguments(self.recipe), **options}
        tuned, report = tune(
            model, calibration, TuningOptions(eval_func=eval_func, sampling_sizes=[self.samples], **arguments)
        )
        return (tuned if isinstance(self.recipe.settings, WeightOnly) else convert(tuned)), report


def tuning_arguments(recipe: Recipe) -> dict[str, Any]:
    """What `recipe` says to `autotune`.

    Of a static one what is tried: with SmoothQuant its alpha and "auto". Of a weight-only one the dtype, beside INT8
    for layers that need it, the compute mode, and GPTQ or AWQ if that is its algorithm; group sizes and zero points are
    open. The modules it skips stay in float. Raises ValueError for a dynamic recipe, which has nothing to tune.
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
