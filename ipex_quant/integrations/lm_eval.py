"""The model ``ipex_quant`` for lm-evaluation-harness; importing this module registers it.

From a shell, ``python -m ipex_quant.integrations.lm_eval`` runs the harness' own command with this model registered:

    python -m ipex_quant.integrations.lm_eval run --model ipex_quant \\
        --model_args pretrained=MODEL_DIR,recipe=w4a8-g128 --tasks lambada_openai
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import llm
from ..llm.saved.float_models import load_float_model
from ..numerics.scheme import FLOAT_DTYPES
from ..reading import read_json
from ..recipes.apply import apply_recipe, calibration_data
from ..recipes.recipe import Recipe, load_recipe

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
_FLOAT_MODEL_ONLY = "recipe, dtype, dataset and column are for a directory with a float model"


@register_model("ipex_quant")
class IpexQuantLM(HFLM):
    """A causal language model of this package for lm-evaluation-harness.

    - `pretrained`: a directory that `ipex_quant.llm.save` wrote, or one with a float model; or a model in memory.
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
            if _is_path(tokenizer):  # code beside it is never run
                tokenizer = AutoTokenizer.from_pretrained(tokenizer or directory, trust_remote_code=False)
            if quantized:
                model = llm.load(directory)
            else:
                model = _float_model(directory, dtype, recipe and load_recipe(recipe), tokenizer, dataset, column)
        super().__init__(model, backend="causal", tokenizer=tokenizer or directory, device="cpu", **options)


def _is_path(tokenizer: str | PreTrainedTokenizerBase | None) -> bool:
    return tokenizer is None or isinstance(tokenizer, (str, Path))


def _is_quantized(directory: str) -> bool:
    config = Path(directory) / "config.json"
    if not config.is_file():
        raise ValueError(f"pretrained: expected a directory with a config.json, got {directory}")
    description = read_json(config).get("quantization_config")
    return isinstance(description, dict) and description.get("quant_method") == "ipex_quant"


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
