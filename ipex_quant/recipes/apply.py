"""Following a recipe: calibration text to token windows, a float model to a quantized one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import llm
from ..nn.linears import is_linear
from ..quantization import WoqWeightQScheme, gptq
from .recipe import BITS, Recipe


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, samples: int, sequence_length: int
) -> list[torch.Tensor]:
    """At most `samples` windows of token ids, int64 ``[1, sequence_length]``, spread evenly over `text`.

    Raises ValueError when the text does not fill one window.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    available = ids.shape[1] // sequence_length
    if available == 0:
        raise ValueError(
            f"calibration text: expected at least {sequence_length} tokens, got {ids.shape[1]}; "
            "give a longer text or a smaller sequence_length"
        )
    chosen = torch.linspace(0, available - 1, min(samples, available)).round().long().tolist()
    return [ids[:, i * sequence_length : (i + 1) * sequence_length] for i in chosen]


def apply_recipe(
    recipe: Recipe,
    model: nn.Module,
    calibration: Sequence[torch.Tensor] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Quantize a transformers model in place as `recipe` says and return it, ready to generate in `dtype`.

    `calibration` holds windows of token ids as `calibration_windows` returns them; only GPTQ needs it. GPTQ leaves the
    output layer to round-to-nearest. Raises ValueError when GPTQ has nothing to calibrate on.
    """
    mapping = recipe.qconfig_mapping()
    if recipe.algorithm == "gptq":
        if not calibration:
            raise ValueError(f"recipe {recipe.name}: GPTQ needs calibration text, got none")
        model = _apply_gptq(recipe, model, calibration, dtype)
        if not _float_linears(model, recipe):
            return model
    return llm.optimize(model, dtype=dtype, quantization_config=mapping, inplace=True)


def _apply_gptq(recipe: Recipe, model: nn.Module, calibration: Sequence[torch.Tensor], dtype: torch.dtype) -> nn.Module:
    with tempfile.TemporaryDirectory(prefix="ipex_quant_gptq_") as folder:
        gptq(
            model,
            calibration,
            group_size=recipe.group_size,
            wbits=BITS[recipe.weight_dtype],
            sym=recipe.qconfig_mapping().global_qconfig.weight_qscheme == WoqWeightQScheme.SYMMETRIC,
            percdamp=recipe.gptq.percdamp,
            act_order=recipe.gptq.act_order,
            nsamples=len(calibration),
            save_dir=folder,
        )
        return llm.optimize(
            model,
            dtype=dtype,
            quantization_config=recipe.qconfig_mapping(),
            low_precision_checkpoint=llm.utils.load_low_precision_checkpoint(folder),
            inplace=True,
        )


def _float_linears(model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the linear layers that `recipe` wants quantized and that are not yet."""
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and not any(re.match(pattern, name) for pattern in recipe.skip)
    ]
