"""`read_batches`: the items of a calibration dataloader as arguments of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..conversion.example import Example


def read_batches(model: nn.Module, dataloader: Iterable[Any], samples: int) -> list[Example]:
    """The first batches of `dataloader` with at least `samples` samples together, or all batches.

    Items have the forms of `Example.of_item`. Raises ValueError without any, TypeError for another kind of item.
    """
    if not isinstance(dataloader, Iterable):
        raise TypeError(f"calib_dataloader: expected an iterable of batches, got {type(dataloader).__name__}")
    batches: list[Example] = []
    for item in dataloader:
        batches.append(Example.of_item(model, item, "calib_dataloader"))
        samples -= batches[-1].sample_count
        if samples <= 0:
            break
    if not batches:
        raise ValueError("calib_dataloader: expected at least one batch, got none")
    return batches
