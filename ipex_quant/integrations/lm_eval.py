"""The model ``ipex_quant`` for lm-evaluation-harness; importing this module registers it.

From a shell, ``python -m ipex_quant.integrations.lm_eval`` runs the harness' own command with this model registered:

    python -m ipex_quant.integrations.lm_eval run --model ipex_quant \\
        --model_args pretrained=MODEL_DIR,recipe=w4a8-g128 --tasks lambada_openai

`flips` compares the answers of two models to multiple-choice questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import llm
from ..checkpoints import find_gguf, find_quantization_config
from ..llm.saved.float_models import load_float_model
from ..numerics.scheme import FLOAT_DTYPES
from ..recipes.apply import apply_recipe, calibration_data
from ..recipes.recipe import Recipe, load_recipe

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
_FLOAT_MODEL_ONLY = "recipe, dtype, dataset and column are for a directory with a float model"


@register_model("ipex_quant")
class IpexQuantLM(HFLM):
    """A causal language model of this package for lm-evaluation-harness.

    - `pretrained`: a directory with a float model, or what `ipex_quant.llm.load` reads: what `ipex_quant.llm.save` or
      another tool wrote, or a GGUF file; or a model in memory.
    - `recipe`: the recipe to quantize a float model with, a name or a YAML file as in ``ipex-quant quantize``. Without
      one the model stays in float, with native ops around its linear layers.
    - `dtype`: the dtype of a float model's activations: bfloat16, float16 or float32.
    - `dataset`, `column`: the calibration text, as in `ipex_quant.quantization.calibration_dataloader`.
    - `tokenizer`: by default that in the model's directory; a model in memory that was not loaded needs one.
    - `device`: without effect (the harness' default is a GPU); models of this package run on the CPU.
    - `options`: options of the harness' own ``hf`` model that do not concern loading (``batch_size``, ``max_length``,
      ...).

    Raises ValueError for a directory without a model, and for an argument that does not fit `pretrained`; TypeError for
    a model that is no transformers model.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        recipe: str | None = None,
        dtype: str | torch.dtype | None = None,
        dataset: str | None = None,
        column: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if dataset is not None and recipe is None:
            raise ValueError("dataset: it is what a recipe calibrates on, expected a recipe too")
        for_float = (recipe, dtype, dataset, column) != (None, None, None, None)
        if isinstance(pretrained, nn.Module):
            if not isinstance(pretrained, PreTrainedModel):
                raise TypeError(f"pretrained: expected a transformers model, got {type(pretrained).__name__}")
            if for_float:
                raise ValueError(f"pretrained: {_FLOAT_MODEL_ONLY}, got a model in memory")
            model, directory = pretrained, pretrained.name_or_path
        else:
            directory = str(pretrained)
            quantized = _is_quantized(directory)
            if quantized and for_float:
                raise ValueError(f"pretrained: {_FLOAT_MODEL_ONLY}, {directory} holds a quantized one")
            if tokenizer is None:
                tokenizer = llm.load_tokenizer(directory)
            elif isinstance(tokenizer, (str, Path)):  # code beside it is never run
                tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            if quantized:
                model = llm.load(directory)
            else:
                model = _float_model(directory, dtype, recipe and load_recipe(recipe), tokenizer, dataset, column)
        super().__init__(model, backend="causal", tokenizer=tokenizer or directory, device="cpu", **options)


@dataclass(frozen=True)
class Flips:
    """How a model and its reference answer the questions of a multiple-choice task.

    Of `questions`, both have another answer to `changed`; the reference alone is right at `lost`, the model alone at
    `gained`. Accuracies can be equal while answers flip (Dutta et al., "Accuracy is Not All You Need", arXiv
    2407.09141).
    """

    questions: int
    changed: int
    lost: int
    gained: int
    reference_accuracy: float
    accuracy: float


def flips(reference: LM, model: LM, folder: str | Path, limit: int | None = None) -> dict[str, Flips]:
    """`Flips` of `model` and `reference` by task, for the multiple-choice tasks that YAML files in `folder` define.

    Both are models of the harness, such as `IpexQuantLM`. At most `limit` questions of a task count. Raises ValueError
    for a folder without tasks, and for a task that is no multiple choice with the metric ``acc``.
    """
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if not manager.all_tasks:
        raise ValueError(f"{folder}: expected YAML files of lm-evaluation-harness' tasks, found none")
    expected, actual = (_samples(each, manager, limit) for each in (reference, model))
    return {task: _flips(task, expected[task], actual[task]) for task in expected}


def _samples(model: LM, manager: TaskManager, limit: int | None) -> Mapping[str, list[dict[str, Any]]]:
    """The answered questions of every task."""
    names = list(manager.all_tasks)
    found = simple_evaluate(model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    return found["samples"]


def _flips(task: str, reference: list[dict[str, Any]], model: list[dict[str, Any]]) -> Flips:
    changed = lost = gained = right_before = right = 0
    after = {sample["doc_id"]: sample for sample in model}
    for sample in reference:
        other = after[sample["doc_id"]]
        changed += _answer(task, sample) != _answer(task, other)
        before, now = bool(sample["acc"]), bool(other["acc"])
        lost, gained = lost + (before and not now), gained + (now and not before)
        right_before, right = right_before + before, right + now
    questions = len(reference)
    return Flips(questions, changed, lost, gained, right_before / questions, right / questions)


def _answer(task: str, sample: Mapping[str, Any]) -> int:
    """The choice with the highest likelihood."""
    scores = sample["filtered_resps"]
    if "acc" not in sample or not all(isinstance(score, (tuple, list)) and len(score) == 2 for score in scores):
        raise ValueError(f"{task}: expected a multiple-choice task with the metric acc")
    return max(range(len(scores)), key=lambda choice: scores[choice][0])


def _is_quantized(directory: str) -> bool:
    path = Path(directory)
    if find_gguf(path) is not None:
        return True
    if not (path / "config.json").is_file():
        raise ValueError(f"pretrained: expected a directory with a config.json, got {directory}")
    return find_quantization_config(path) is not None


def _float_model(
    directory: str,
    dtype: str | torch.dtype | None,
    recipe: Recipe | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | None,
    column: str | None,
) -> PreTrainedModel:
    """The float model in `directory`, quantized by `recipe` if there is one."""
    dtype = _DTYPES.get(str(dtype or torch.bfloat16).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}")
    calibration = () if recipe is None else calibration_data(recipe, tokenizer, dataset, column)
    model = load_float_model(directory, dtype)
    if recipe is None:
        return llm.optimize(model, dtype=dtype, inplace=True)
    return apply_recipe(recipe, model, calibration, dtype)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
