"""`apply_recipe`: quantize a float model by a recipe; `calibration_data`: read its calibration text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import PreTrainedTokenizerBase

from .. import data, llm
from ..autotune.candidate import WeightOnlyCandidate
from ..autotune.weight_only import find_weights, quantized_model
from ..conversion.calibration_batches import Samples, calibration_batches
from ..conversion.calibration_imatrix import layer_importances
from ..conversion.calibration_text import text_documents
from ..conversion.example import Example
from ..conversion.found import FoundWeights
from ..conversion.gptq import GptqRun
from ..conversion.prepare import convert_some
from ..conversion.rules import choose_weight_only
from ..llm.saved.notes import note_recipe
from ..nn.embeddings import is_embedding
from ..nn.linears import holds_experts, is_linear, output_head, weight_matrix
from ..quantization import auto_round, awq, calibrate, calibration_dataloader, prepare, rotate
from ..woq.clip_search import rtn_searched
from .recipe import ALGORITHMS, AutoRound, Awq, Calibrated, Gptq, Recipe, WeightOnly, layer_widths

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..conversion.calibration_text import Source


def calibration_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: Source | None = None, column: str | None = None
) -> DataLoader | tuple[()]:
    """A `calibration_dataloader` of the windows that `recipe` calibrates on; empty if it does not calibrate.

    The default of `source` is `data.calibration_text()`. Raises as `calibration_dataloader` does.
    """
    if not isinstance(recipe.settings, Calibrated):
        return ()
    size = recipe.settings.samples, recipe.settings.sequence_length
    if source is None:
        source = text_documents(StringIO(data.calibration_text()))
    return calibration_dataloader(source, tokenizer, *size, column=column)


def apply_recipe(
    recipe: Recipe,
    model: nn.Module,
    calibration: Collection[Any] | DataLoader = (),
    dtype: torch.dtype = torch.bfloat16,
    work_dir: str | Path | None = None,
    imatrix: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Quantize a transformers model in place by `recipe` and return it, ready to generate in `dtype`.

    `calibration` is the result of `calibration_data`, or other batches of arguments of `model`. With GPTQ, AWQ and
    AutoRound the output layer is rounded to nearest. `work_dir` is that of `quantization.auto_round`. `imatrix`, which
    `read_imatrix` reads, says which input features count when rtn looks for scales. Raises ValueError if the recipe
    calibrates and `calibration` is empty, for a `work_dir` or `imatrix` with another algorithm, and as
    `layer_importances` and, for a recipe that rotates, `rotate` do; rotate models in float32.
    """
    if imatrix is not None and type(recipe.settings) is not WeightOnly:
        raise ValueError(f"imatrix: recipe {recipe.name} has statistics of its own, it is for rtn; leave it out")
    if work_dir is not None and not isinstance(recipe.settings, AutoRound):
        raise ValueError(f"work_dir: recipe {recipe.name} is quick, and keeps no unfinished work; leave it out")
    if isinstance(recipe.settings, Calibrated) and not len(calibration):
        raise ValueError(f"recipe {recipe.name}: it needs calibration text, got none")
    if recipe.rotate:
        model = rotate(model, inplace=True)
    mapping = recipe.qconfig_mapping(model)
    if isinstance(recipe.settings, WeightOnly) and (recipe.settings.schemes or imatrix is not None):
        model = _apply_schemes(recipe.settings, mapping, model, calibration, imatrix, work_dir)
        mapping = mapping if _left_in_float(model, recipe) else None  # experts
    elif isinstance(recipe.settings, Gptq):
        model = _apply_gptq(recipe, model, calibration, dtype)
        mapping = mapping if _left_in_float(model, recipe) else None
    elif isinstance(recipe.settings, Awq | AutoRound):
        size = {"nsamples": recipe.settings.samples, "pad_max_length": recipe.settings.sequence_length, "inplace": True}
        if isinstance(recipe.settings, Awq):
            model = awq(model, calibration, mapping, recipe.settings.options(), **size)
        else:
            model = auto_round(model, calibration, mapping, recipe.settings.options(), **size, work_dir=work_dir)
        mapping = None
    elif isinstance(recipe.settings, Calibrated):
        prepared = prepare(model, mapping, example_kwarg_inputs=dict(next(iter(calibration))), inplace=True)
        model = convert_some(calibrate(prepared, calibration), inplace=True)
        mapping = None
    model = llm.optimize(model, dtype=dtype, quantization_config=mapping, inplace=True)
    note_recipe(model, recipe.note)
    return model


def _apply_schemes(
    settings: WeightOnly,
    mapping: QConfigMapping,
    model: nn.Module,
    calibration: Collection[Any],
    imatrix: Mapping[str, torch.Tensor] | None,
    work_dir: str | Path | None,
) -> nn.Module:
    """Quantize the linear layers and embeddings of `model` as `autotune` does."""
    chosen = choose_weight_only(mapping, model, "schemes")
    layers = {name: qconfig for name, qconfig in chosen.items() if not holds_experts(model.get_submodule(name))}
    algorithm = next(name for name, kind in ALGORITHMS.items() if kind is type(settings))
    schemes = tuple((name, qconfig.scheme) for name, qconfig in layers.items())
    candidate = WeightOnlyCandidate(algorithm, settings.lowp_mode, schemes)
    batches: list[Example] = []
    if isinstance(settings, Calibrated):
        samples = Samples(settings.samples, settings.sequence_length)
        batches = [Example(kwargs=each) for each in calibration_batches(model, calibration, samples)]
    options = settings.options() if isinstance(settings, Gptq | Awq | AutoRound) else None
    found = find_weights(model, batches, candidate, options, None if work_dir is None else Path(work_dir))
    if imatrix is not None:
        searched = {
            name: rtn_searched(weight_matrix(model.get_submodule(name)), layers[name].scheme, each, torch.float16)
            for name, each in layer_importances(imatrix, model).items()
            if name in layers and layers[name].scheme.dtype.has_integers
        }
        found = FoundWeights({**found.weights, **searched}, found.parameters)
    return quantized_model(model, candidate, found, settings.act_quant_mode, inplace=True)


def _apply_gptq(recipe: Recipe, model: nn.Module, calibration: Collection[Any], dtype: torch.dtype) -> nn.Module:
    settings: Any = recipe.settings
    scheme = replace(settings.qconfig().scheme, group_size=_group_size(recipe, model))
    run = GptqRun.of(
        model, calibration, scheme, settings.options(), Samples(settings.samples, settings.sequence_length)
    )
    return llm.optimize(
        model,
        dtype=dtype,
        quantization_config=recipe.qconfig_mapping(model),
        low_precision_checkpoint=run.weights(),
        inplace=True,
    )


def _group_size(recipe: Recipe, model: nn.Module) -> int:
    """The group size for all layers, since a GPTQ checkpoint has one: the smallest that a layer needs."""
    head = output_head(model)
    widths = [width for name, width in layer_widths(model).items() if name != head]
    settings: Any = recipe.settings
    return min(map(settings.group_size_for, widths), default=settings.group_size)


def _left_in_float(model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers, experts and embeddings in float that `recipe` quantizes."""
    embeddings = nn.Embedding in recipe.settings.types()
    return [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or holds_experts(module) or (embeddings and is_embedding(module)))
        and not any(re.match(pattern, name) for pattern in recipe.skip)
    ]
