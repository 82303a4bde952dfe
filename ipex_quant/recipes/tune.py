"""`Tuning`: run `autotune` on the settings that a recipe leaves open, or on all weight-only schemes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import evaluation
from ..autotune import Report, TuningOptions, WeightOnlySpace, tune
from ..autotune.space import INTEGERS
from ..quantization import WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme, convert
from .apply import calibration_data
from .recipe import AutoRound, Awq, Gptq, Recipe, SmoothQuant, Static, WeightOnly
from .tuned import tuned_recipe

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..conversion.calibration_text import Source

_ALGORITHMS = {"gptq": Gptq, "awq": Awq, "auto_round": AutoRound}

EVERY_SCHEME = WeightOnlySpace(
    weight_dtypes=(*INTEGERS, WoqWeightDtype.IQ4),
    group_sizes=(128, 64, 32),
    qschemes=(WoqWeightQScheme.UNDEFINED,),
    algorithms=("gptq", "rtn"),
    lowp_modes=(WoqLowpMode.INT8,),
    act_quant_mode=WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM,
)
"""What is tuned without a recipe: integers of 2 to 8 bits, with zero points where there are less than 8, and IQ4."""


@dataclass(frozen=True)
class Tuning:
    """Runs `autotune` around `recipe`, or on `EVERY_SCHEME` without one.

    It calibrates on `samples` windows of `sequence_length` tokens. `algorithms` are those of a `WeightOnlySpace` to try
    in place of the recipe's own or `EVERY_SCHEME`'s.
    """

    recipe: Recipe | None
    tokenizer: PreTrainedTokenizerBase
    samples: int = 100
    sequence_length: int = 512
    algorithms: Sequence[str] | None = None

    def calibration(self, source: Source | None = None, column: str | None = None) -> DataLoader:
        """The windows to calibrate on, from `calibration_data`."""
        recipe = Recipe("calibration", Static(self.samples, self.sequence_length))
        return calibration_data(recipe, self.tokenizer, source, column)

    def perplexity(self, text: str, max_tokens: int) -> Callable[[nn.Module], float]:
        """A metric of a causal language model: its negative perplexity on the beginning of `text`."""
        return lambda model: -evaluation.perplexity(model, self.tokenizer, text, self.sequence_length, max_tokens)

    def divergence(self, reference: nn.Module, text: str, max_tokens: int) -> Callable[[nn.Module], float]:
        """A metric of a causal language model: its negative divergence from `reference` on the beginning of `text`."""

        def measure(model: nn.Module) -> float:
            found = evaluation.compare(reference, model, self.tokenizer, text, self.sequence_length, max_tokens)
            return -found.kl_divergence

        return measure

    def recipe_of(self, report: Report) -> Recipe:
        """The recipe of the result of a weight-only search that `run` made."""
        space = tuning_arguments(self.recipe, self.algorithms)["quantization_config"]
        return tuned_recipe(report, space.act_quant_mode, self.samples, self.sequence_length)

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
        arguments = {**tuning_arguments(self.recipe, self.algorithms), **options}
        tuned, report = tune(
            model, calibration, TuningOptions(eval_func=eval_func, sampling_sizes=[self.samples], **arguments)
        )
        return (tuned if "quantization_config" in arguments else convert(tuned)), report


def tuning_arguments(recipe: Recipe | None, algorithms: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments of `autotune` for tuning around `recipe`, or on `EVERY_SCHEME` without one.

    For SmoothQuant they try "auto" and the recipe's alpha, for other static recipes no smoothing. For weight-only
    recipes they fix the dtype (and INT8 for layers that need it), the compute mode and the algorithm (or "rtn"); group
    sizes and zero points are tuned. Modules that the recipe skips stay in float. `algorithms` take the place of those.
    Raises ValueError for a dynamic recipe, which has nothing to tune, and for `algorithms` that are unknown or beside a
    static recipe.
    """
    if recipe is None:
        return {
            "quantization_config": EVERY_SCHEME if algorithms is None else replace(EVERY_SCHEME, algorithms=algorithms)
        }
    settings = recipe.settings
    fp32 = {"weight": {"dtype": ["fp32"]}}
    arguments: dict[str, Any] = {"op_type_dict": {f"(?:{pattern}).*": fp32 for pattern in recipe.skip} or None}
    if isinstance(settings, (SmoothQuant, Static)):
        if algorithms is not None:
            raise ValueError(f"algorithms: recipe {recipe.name} is static INT8, which has none; leave them out")
        alphas = ["auto", settings.alpha] if isinstance(settings, SmoothQuant) else [None]
        return {**arguments, "smoothquant_args": {"alpha": alphas}}
    if not isinstance(settings, WeightOnly):
        raise ValueError(f"recipe {recipe.name}: expected a static or weight-only one; this one has nothing to tune")
    space = WeightOnlySpace(
        weight_dtypes=[settings.weight_dtype, WoqWeightDtype.INT8],
        algorithms=algorithms or [*(name for name, kind in _ALGORITHMS.items() if isinstance(settings, kind)), "rtn"],
        lowp_modes=[settings.lowp_mode],
        act_quant_mode=settings.act_quant_mode,
        embeddings=settings.embedding_dtype is not None,
    )
    return {**arguments, "quantization_config": space}
