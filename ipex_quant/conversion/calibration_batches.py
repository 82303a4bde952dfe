"""`calibration_batches`: keyword arguments of a model from the items of a dataloader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .example import Example

MAIN_INPUT = "input_ids"
"""Name of a model's main input, if it has no `main_input_name`."""

_SEQUENCES = ("input_ids", "inputs_embeds")
_OF_TOKENS = {
    *_SEQUENCES,
    "attention_mask",
    "cache_position",
    "decoder_attention_mask",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "encoder_outputs",
    "position_ids",
    "special_tokens_mask",
    "token_type_ids",
}
"""Inputs of language models; batches with other inputs, such as features of images, are not cut in length."""


@dataclass(frozen=True)
class Samples:
    """How much of a dataloader to read: `count` sequences, each cut to `max_length` tokens.

    With `only_full`, shorter sequences are skipped. Raises ValueError for a `count` or `max_length` below 1.
    """

    count: int = 128
    max_length: int = 2048
    only_full: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_length < 1:
            raise ValueError(
                f"nsamples and pad_max_length: expected at least 1, got {self.count} and {self.max_length}"
            )


def calibration_batches(model: nn.Module, dataloader: Iterable[object], samples: Samples) -> list[dict[str, Any]]:
    """Keyword arguments for `model` from the items of a dataloader, in the forms that `gptq` documents.

    A single tensor is the model's main input. Raises ValueError if there is no usable sample, and TypeError for another
    kind of item.
    """
    main_input = getattr(model, "main_input_name", MAIN_INPUT)
    batches: list[dict[str, Any]] = []
    wanted = samples.count
    for item in dataloader:
        batch = _as_batch(model, item, main_input)
        first = _first(batch, main_input)
        length = _length(batch)
        if first.numel() == 0 or (samples.only_full and length is not None and length < samples.max_length):
            continue
        batch = _cut_rows(batch, len(first), wanted)
        if length is not None and batch.keys() <= _OF_TOKENS:
            batch = _cut_length(batch, length, samples.max_length)
        batches.append(batch)
        wanted -= len(_first(batch, main_input))
        if wanted <= 0:
            break
    if not batches:
        least = f" of at least pad_max_length={samples.max_length} tokens" if samples.only_full else ""
        raise ValueError(f"dataloader: expected at least one sample{least}, got none")
    return batches


def _first(batch: Mapping[str, Any], main_input: str) -> torch.Tensor:
    """The tensor with one row per sample: the tokens, or else the main input, or else the first float tensor."""
    names = [name for name in (*_SEQUENCES, main_input) if name in batch]
    floats = [name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return batch[(names or floats)[0]]


def _length(batch: Mapping[str, Any]) -> int | None:
    """Number of tokens of each sequence; None if the batch has no tokens."""
    return next((batch[name].shape[1] for name in _SEQUENCES if name in batch), None)


def _cut_rows(batch: dict[str, Any], rows: int, wanted: int) -> dict[str, Any]:
    """The first `wanted` of `rows` samples; all of them if some tensor does not have one row per sample."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if rows <= wanted or (not batch.keys() <= _OF_TOKENS and any(len(tensor) != rows for tensor in tensors)):
        return batch
    return {
        name: value[:wanted] if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows else value
        for name, value in batch.items()
    }


def _cut_length(batch: dict[str, Any], length: int, max_length: int) -> dict[str, Any]:
    """The batch with its sequences, and tensors of a decoder, cut to the first `max_length` positions."""

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        return value[:, :max_length] if value.shape[1] == length or name.startswith("decoder_") else value

    return {name: cut(name, value) for name, value in batch.items()}


def _as_batch(model: nn.Module, item: object, main_input: str) -> dict[str, Any]:
    while isinstance(item, (tuple, list)) and item:  # the other elements of a tuple are labels
        item = item[0]
    if isinstance(item, torch.Tensor):
        item = {main_input: item}
    given = Example.of_item(model, item, "dataloader").by_name(model)
    batch = {name: _tensor(name, value) for name, value in given.items() if name != "labels"}
    tokens = batch.get("input_ids")
    if tokens is None:
        if not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in batch.values()):
            raise TypeError(
                f"dataloader: expected a mapping with input_ids or features that the model takes, got one of {[*batch]}"
            )
        return batch
    if tokens.dim() == 1:
        batch = {name: v.unsqueeze(0) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    if batch["input_ids"].dim() != 2:
        raise ValueError(f"input_ids: expected shape [B, T] or [T], got {list(batch['input_ids'].shape)}")
    return batch


def _tensor(name: str, value: object) -> Any:
    """`value`, an array or list of numbers, as a tensor; None, numbers, strings and mappings are returned unchanged."""
    if value is None or isinstance(value, (bool, str, int, float, Mapping)):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"dataloader: {name}: expected a tensor or numbers of one shape: {error}") from error
