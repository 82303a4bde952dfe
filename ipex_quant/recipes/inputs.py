"""What models are called with to be calibrated and compared: windows of a text, or tensors from a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import evaluation


def takes_text(model: PreTrainedModel) -> bool:
    """Whether the first thing that `model` is called with is token ids."""
    return model.main_input_name == "input_ids"


def predicts_next_tokens(model: PreTrainedModel) -> bool:
    """Whether `model` has a perplexity: it continues a text, with nothing beside."""
    return takes_text(model) and model.can_generate() and not model.config.is_encoder_decoder


def of_model(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """`batches` as `model` takes them: floats in its dtype, and for a decoder the tokens that its encoder reads."""
    needs_target = takes_text(model) and model.config.is_encoder_decoder
    calls = []
    for batch in batches:
        call = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in batch.items()}
        if needs_target and not call.keys() & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}:
            call["decoder_input_ids"] = call["input_ids"]
        calls.append(call)
    return calls


def text_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    sequence_length: int,
    max_tokens: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Windows of `text` that `model` can be called with; ValueError for a model that is not called with token ids."""
    check_takes_text(model, tokenizer)
    windows = evaluation.token_windows(tokenizer, text, sequence_length - 1, max_tokens)  # which share a token
    return [{"input_ids": window} for window in windows]


def check_takes_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """ValueError for a model that is not called with token ids, or has no tokenizer."""
    if not takes_text(model) or tokenizer is None:
        raise ValueError(
            f"a {type(model).__name__} is not called with text: give --inputs, a safetensors file of what it is called "
            "with"
        )


def read_inputs(path: Path) -> list[dict[str, torch.Tensor]]:
    """One call for each sample in a safetensors file of named inputs ``[samples, ...]``.

    Raises OSError for a file that cannot be read, ValueError for one that is none or has inputs of several lengths.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file, or a damaged one ({error})") from error
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or 0 in lengths:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{path}: expected tensors with as many samples each, got {shapes}")
    return [{name: each[i : i + 1] for name, each in tensors.items()} for i in range(lengths.pop())]
