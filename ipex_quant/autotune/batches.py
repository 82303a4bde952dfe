"""What a calibration dataloader yields, as arguments of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..conversion.example import Example


def read_batches(model: nn.Module, dataloader: Iterable[Any], samples: int) -> list[Example]:
    """The first batches of `dataloader` that hold `samples` samples, or all of them.

    An item is a mapping of the forward's arguments, a tuple or list of them, one tensor, or a pair of one of these and
    something that is not for the model: the index of the last token, or a label. Raises ValueError without any item,
    TypeError for another kind of item.
    """
    if not isinstance(dataloader, Iterable):
        raise TypeError(f"calib_dataloader: expected an iterable of batches, got {type(dataloader).__name__}")
    batches: list[Example] = []
    for item in dataloader:
        batches.append(_arguments(model, item))
        samples -= sample_count(batches[-1])
        if samples <= 0:
            break
    if not batches:
        raise ValueError("calib_dataloader: expected at least one batch, got none")
    return batches


def sample_count(batch: Example) -> int:
    """Samples in a batch: the length of its first tensor."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.dim()), 1)


def tensors(batch: Example) -> Iterator[torch.Tensor]:
    """The tensors among the arguments."""
    yield from (value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor))


def _arguments(model: nn.Module, item: Any) -> Example:
    if isinstance(item, (tuple, list)) and len(item) == 2 and _is_inputs(item[0]) and _is_aside(model, *item):
        item = item[0]
    if isinstance(item, Mapping):
        return Example(kwargs=dict(item))
    if isinstance(item, torch.Tensor):
        return Example((item,))
    if isinstance(item, (tuple, list)) and item:
        return Example(tuple(item))
    raise TypeError(
        "calib_dataloader: expected batches that are a mapping, a tuple, a list or a tensor, or a pair of one of these "
        f"and an index or label, got {type(item).__name__}"
    )


def _is_inputs(value: Any) -> bool:
    return isinstance(value, (Mapping, tuple, list, torch.Tensor))


def _is_aside(model: nn.Module, inputs: Any, other: Any) -> bool:
    """Whether `other` is not for the model: beside complete arguments, or one whole number a sample beside a tensor."""
    if not isinstance(inputs, torch.Tensor):
        return True
    try:
        inspect.signature(model.forward).bind(inputs)
    except TypeError:
        return False
    if isinstance(other, torch.Tensor):
        whole = not other.is_floating_point() and not other.is_complex()
        return whole and other.dim() <= 1 < inputs.dim() and other.numel() in (1, len(inputs))
    return isinstance(other, (int, str)) or (isinstance(other, Sequence) and all(isinstance(n, int) for n in other))
