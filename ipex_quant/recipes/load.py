"""`quantized`: quantize a float model in a directory by a recipe, in as little memory as the recipe allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import evaluation
from ..llm.loading import load_float, load_rounded, load_stored
from ..llm.saved.notes import note_recipe
from . import inputs
from .apply import apply_recipe
from .recipe import Calibrated, Dynamic, Recipe, WeightOnly


def quantized(
    recipe: Recipe,
    directory: Path,
    dtype: torch.dtype,
    calibration: Sequence[Any] = (),
    check: Callable[[PreTrainedModel], None] | None = None,
    trust_remote_code: bool = False,
    work_dir: Path | None = None,
    imatrix: Mapping[str, torch.Tensor] | None = None,
) -> tuple[PreTrainedModel, int]:
    """The float model in `directory`, quantized by `recipe` for inference in `dtype`, and the bytes that it had.

    Weights that are rounded to nearest are so as they are read. GPTQ, AWQ and AutoRound read the linear layers of one
    block at a time. Only recipes that observe activations have the float model in memory as a whole, and those that
    rotate it, in float32. `calibration`, `work_dir` and `imatrix` are those of `apply_recipe`; ``check(model)`` may
    raise for a model that cannot be calibrated on it. Raises as `apply_recipe` and `load_float` do.
    """
    mixed = isinstance(recipe.settings, WeightOnly) and bool(recipe.settings.schemes)
    if not isinstance(recipe.settings, Calibrated | Dynamic) and not (mixed or recipe.rotate) and imatrix is None:
        sizes: list[int] = []

        def mapping_of(model: PreTrainedModel) -> Any:
            sizes.append(_bytes_in_memory(model))
            return recipe.qconfig_mapping(model)

        model = load_rounded(directory, dtype, mapping_of, trust_remote_code=trust_remote_code)
        note_recipe(model, recipe.note)
        return model, sizes[0]
    if recipe.rotate:
        model = load_float(directory, torch.float32, trust_remote_code)
    elif isinstance(recipe.settings, WeightOnly | Dynamic):
        model = load_stored(directory, dtype, recipe.qconfig_mapping, trust_remote_code)
    else:
        model = load_float(directory, dtype, trust_remote_code)
    if check is not None and isinstance(recipe.settings, Calibrated):
        check(model)
    before = evaluation.model_bytes(model)
    calls = inputs.of_model(model, calibration)
    dtype = dtype if recipe.rotate else model.dtype
    return apply_recipe(recipe, model, calls, dtype, work_dir, imatrix), before


def _bytes_in_memory(model: PreTrainedModel) -> int:
    """Bytes that `model`, on the meta device, would have in memory, each tied weight once."""
    tied = model.all_tied_weights_keys
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if name not in tied)
