"""The default metric, without an `eval_func`: how close a model's outputs are to the float model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..conversion.example import Example
from ..evaluation import main_output
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
