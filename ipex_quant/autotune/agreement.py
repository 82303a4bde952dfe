"""The metric without an `eval_func`: how close a model's outputs are to the float model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..nn.modes import evaluating
from ..quantization._example import Example


def agreement(reference: nn.Module, batches: Sequence[Example]) -> Callable[[nn.Module], float]:
    """A metric of a model: 1 less the squared error of its outputs for `batches`, relative to `reference`'s own.

    The outputs are all float tensors that the first output which has any contains (logits come first).
    """

    def measure(model: nn.Module) -> float:
        error = power = 0.0
        with torch.no_grad(), evaluating(reference), evaluating(model):
            for batch in batches:
                expected, actual = (_output(each(*batch.args, **batch.kwargs)) for each in (reference, model))
                error += float((actual - expected).square().sum())
                power += float(expected.square().sum())
        return 1 - error / max(power, torch.finfo(torch.float32).tiny)

    return measure


def _output(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, torch.Tensor) else tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.float()
    raise TypeError("calib_dataloader: the model returns no float tensor to compare outputs by; give an eval_func")
