"""The default metrics, without an `eval_func`: how close a model's outputs are to the float model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..conversion.example import Example
from ..evaluation import compare_outputs, main_output
from ..nn.modes import evaluating


def agreement(reference: nn.Module, batches: Sequence[Example]) -> Callable[[nn.Module], float]:
    """A metric of a model: 1 minus the squared error of its outputs for `batches`, relative to those of `reference`.

    The output compared is that of `evaluation.main_output`: the logits, or the first float tensor.
    """

    def measure(model: nn.Module) -> float:
        error = power = 0.0
        with torch.no_grad(), evaluating(reference), evaluating(model):
            for batch in batches:
                outputs = (each(*batch.args, **batch.kwargs) for each in (reference, model))
                expected, actual = (main_output(output)[0] for output in outputs)
                error += float((actual - expected).square().sum())
                power += float(expected.square().sum())
        return 1 - error / max(power, torch.finfo(torch.float32).tiny)

    return measure


def divergence(reference: nn.Module, batches: Sequence[Example]) -> Callable[[nn.Module], float]:
    """A metric of a model with logits: minus their KL divergence from those of `reference`, in nats a prediction.

    Raises ValueError for a model without logits.
    """
    inputs = [batch.by_name(reference) for batch in batches]

    def measure(model: nn.Module) -> float:
        found = compare_outputs(reference, model, ((each, each) for each in inputs)).kl_divergence
        if found is None:
            raise ValueError(f"max_kl: a {type(model).__name__} has no logits, whose divergence it could be")
        return -found

    return measure


def has_logits(model: nn.Module, batch: Example) -> bool:
    """Whether the main output of `model` for `batch` is logits."""
    with torch.no_grad(), evaluating(model):
        return main_output(batch.run(model))[1]
