"""Inputs for calibrating and comparing models: windows of a text, or tensors from a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import evaluation


def takes_text(model: PreTrainedModel) -> bool:
    """Whether the main input of `model` is token ids."""
    return model.main_input_name == "input_ids"


def predicts_next_tokens(model: PreTrainedModel) -> bool:
    """Whether `model` is a causal language model, which has a perplexity."""
    return takes_text(model) and model.can_generate() and not model.config.is_encoder_decoder


def of_model(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """`batches` for `model`: floats in its dtype, and for encoder-decoder models the tokens also for the decoder."""
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
    """Windows of `text` as inputs of `model`; ValueError for a model whose main input is not token ids."""
    check_takes_text(model, tokenizer)
    windows = evaluation.token_windows(tokenizer, text, sequence_length - 1, max_tokens)  # neighbours share a token
    return [{"input_ids": window} for window in windows]


def check_takes_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise ValueError for a model whose main input is not token ids, or without a tokenizer."""
    if not takes_text(model) or tokenizer is None:
        raise ValueError(
            f"a {type(model).__name__} is not called with text: give --inputs, a safetensors file of what it is called "
            "with"
        )


def read_inputs(path: Path) -> list[dict[str, torch.Tensor]]:
    """Keyword arguments for each sample in a safetensors file of named inputs ``[samples, ...]``.

    Raises OSError for a file that cannot be read, ValueError for one that is no safetensors file or has inputs of
    different lengths.
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
