"""IPEX's decoding functions, which scripts bind to a model: `generate` with one method of decoding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from ..errors import ArgumentError

Result = Any
"""What `generate` returns: tokens ``[B, L]``, or a `ModelOutput` with ``return_dict_in_generate=True``."""


def hf_greedy_search(self: GenerationMixin, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """Generate from `input_ids` ``[B, L]``, taking the most likely token each time.

    The further arguments are IPEX's: `logits_processor` and `stopping_criteria`, by position too, and keywords of
    `generate`. As a method, ``hf_greedy_search.__get__(model)``, it needs nothing else.
    """
    return _generate(self, input_ids, args, {**kwargs, "do_sample": False, "num_beams": 1})


def hf_sample(self: GenerationMixin, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """Generate as `hf_greedy_search` does, with sampled tokens."""
    return _generate(self, input_ids, args, {**kwargs, "do_sample": True, "num_beams": 1})


def hf_beam_search(self: GenerationMixin, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """Generate as `hf_greedy_search` does, with `num_beams` beams of a prompt, or those of the `generation_config`.

    `input_ids` hold each prompt once. Raises ValueError without beams.
    """
    return _generate(self, input_ids, args, {"num_beams": _beams(self, kwargs), **kwargs, "do_sample": False})


def hf_beam_sample(self: GenerationMixin, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """Generate as `hf_beam_search` does, with beams of sampled tokens."""
    return _generate(self, input_ids, args, {"num_beams": _beams(self, kwargs), **kwargs, "do_sample": True})


def _beams(model: GenerationMixin, given: dict[str, Any]) -> int:
    """The number of beams that the arguments `given`, or else the model, ask for; ValueError if there is only one."""
    config = given.get("generation_config") or model.generation_config
    beams = given.get("num_beams") or config.num_beams or 1
    if beams < 2:
        raise ArgumentError(f"num_beams: beam search needs at least 2, got {beams}; pass num_beams=4, for instance")
    return beams


def _generate(
    model: GenerationMixin, input_ids: torch.Tensor, args: tuple[Any, ...], options: dict[str, Any]
) -> Result:
    names = ("logits_processor", "stopping_criteria", "generation_config")
    if len(args) > len(names):
        raise ArgumentError(f"expected at most {', '.join(names)} by position, got {len(args)} arguments")
    return model.generate(input_ids, **dict(zip(names, args, strict=False)), **options)
