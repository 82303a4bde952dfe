"""`rope_parameters`: how a GGUF file says that positions are rotated, in transformers' words."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...checkpoints import GgufFile
from ...reading import shown

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all models with this scaling have; files hold only what it makes of the frequencies."""


def rope_parameters(file: GgufFile, head_size: int) -> dict[str, Any]:
    """The `rope_parameters` of a model with heads of `head_size`; ValueError for a scaling that is not known.

    Tensors with a factor for each frequency, which files hold where no number says how they are scaled, become
    "llama3" if that makes the same ones, else "longrope", which takes any.
    """
    parameters: dict[str, Any] = {"rope_theta": file.of_model("rope.freq_base", float, 10_000.0)}
    check_above_0(file, "rope.freq_base", parameters["rope_theta"])
    context = file.of_model("context_length", int)
    original = file.of_model("rope.scaling.original_context_length", int, context)
    check_above_0(file, "rope.scaling.original_context_length", original)
    if "rope_factors_long.weight" in file.tensors:
        parts = {f"{part}_factor": _factors(file, f"rope_factors_{part}.weight").tolist() for part in ("long", "short")}
        parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original, **parts}
        factor = file.of_model("rope.scaling.attn_factor", float, 1.0)
        check_above_0(file, "rope.scaling.attn_factor", factor)
        stated = f"{file.architecture}.rope.scaling.attn_factor" in file.metadata
        return parameters | ({"attention_factor": factor} if stated else {})
    if "rope_freqs.weight" in file.tensors:
        factors = _factors(file, "rope_freqs.weight")
        return parameters | _of_factors(factors, parameters["rope_theta"], head_size, context)
    kind = file.of_model("rope.scaling.type", str, "none")
    factor = file.of_model("rope.scaling.factor", float, file.of_model("rope.scale_linear", float, 1.0))
    check_above_0(file, "rope.scaling.factor", factor)
    if kind == "none" or (kind == "linear" and factor == 1):
        return parameters | {"rope_type": "default"}
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            beta = file.of_model(f"rope.scaling.{key}", float, 0.0)
            yarn |= {name: beta} if beta > 0 else {}
        return parameters | yarn
    raise ValueError(f"{file.path}: rope.scaling.type: expected none, linear, yarn or longrope, got {shown(kind)}")


def check_above_0(file: GgufFile, key: str, value: float) -> None:
    """ValueError unless the `value` of a key of the architecture is above 0."""
    if value <= 0:
        raise ValueError(f"{file.path}: {key}: expected a number above 0, got {value}")


def _factors(file: GgufFile, name: str) -> torch.Tensor:
    """The tensor `name` of divisors of the frequencies, float32; ValueError unless they are numbers above 0."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.kind or tensor.stored.dim() != 1 or tensor.stored.shape.numel() > 1 << 16:
        raise ValueError(f"{file.path}: {name}: expected a row of floats")
    factors = tensor.stored[...].float()
    if not (factors.isfinite() & (factors > 0)).all():
        raise ValueError(f"{file.path}: {name}: expected numbers above 0")
    return factors


def _of_factors(factors: torch.Tensor, theta: float, head_size: int, context: int) -> dict[str, Any]:
    if (factors == 1).all():
        return {"rope_type": "default"}
    largest = float(factors.max())
    frequencies = theta ** (-torch.arange(0, 2 * len(factors), 2, dtype=torch.float32) / (2 * len(factors)))
    length = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # turns in the first context
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = ((length - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / largest + smooth)
    if 2 * len(factors) == head_size and torch.allclose(factors, expected, rtol=1e-4):
        return {"rope_type": "llama3", "factor": largest, **_LLAMA3}
    both = {f"{part}_factor": factors.tolist() for part in ("long", "short")}
    return {"rope_type": "longrope", "attention_factor": 1.0, "original_max_position_embeddings": context, **both}
