"""Measures of a model: perplexity, agreement with a reference, decode speed, size. Pure torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .nn.modes import evaluating

ROWS_AT_ONCE = 128
"""Number of rows of logits in float32 at a time."""


@dataclass(frozen=True)
class Comparison:
    """A model compared with its reference on a text.

    `kl_divergence` is the mean of ``KL(reference || model)`` per token in nats, `kl_99th_percentile` what 99 % of the
    tokens do not exceed, `kl_largest` that of the worst token; `top1_agreement` is the share of tokens for which both
    models rank the same token first; `tokens` counts the predicted tokens.
    """

    reference_perplexity: float
    perplexity: float
    kl_divergence: float
    kl_99th_percentile: float
    kl_largest: float
    top1_agreement: float
    tokens: int


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, sequence_length: int, max_tokens: int | None = None
) -> list[torch.Tensor]:
    """Token ids of `text` as int64 ``[1, sequence_length + 1]`` windows, the last one shorter.

    Neighbours share one token, so that every token but the first is predicted exactly once. Raises ValueError when
    there is nothing to predict.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, got {sequence_length}")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    if max_tokens is not None:
        ids = ids[:, : max_tokens + 1]
    if ids.shape[1] < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {ids.shape[1]}; give a longer text")
    return [ids[:, start : start + sequence_length + 1] for start in range(0, ids.shape[1] - 1, sequence_length)]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that `tokenizer` puts before every text; models that were trained with them need them (Gemma)."""
    whole, plain = (tokenizer("1", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequence_length: int = 512,
    max_tokens: int | None = None,
) -> float:
    """Exponential of the mean negative log-likelihood of the tokens of `text`, in windows of `sequence_length` tokens.

    Each window comes after the `first_tokens` of the tokenizer. At most `max_tokens` tokens are predicted. Raises
    ValueError when `text` has less than two tokens, and for logits that are not finite.
    """
    loss, tokens, first = 0.0, 0, first_tokens(tokenizer)
    with evaluating(model), torch.inference_mode():
        for window in token_windows(tokenizer, text, sequence_length, max_tokens):
            targets = window[0, 1:]
            for rows, (log_probs,) in _log_probs({"model": model}, first, window):
                loss += _negative_log_likelihood(log_probs, targets[rows])
            tokens += len(targets)
    return _perplexity("model", loss, tokens)


def compare(
    reference: nn.Module,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequence_length: int = 512,
    max_tokens: int | None = None,
) -> Comparison:
    """Run both models over the same windows of `text` and compare their distributions of the next token.

    Each window comes after the `first_tokens` of the tokenizer. Both models must have the same vocabulary. Raises
    ValueError when they do not, when `text` has less than two tokens, and for logits or measures that are not finite.
    """
    reference_loss = loss = 0.0
    same, first = 0, first_tokens(tokenizer)
    divergences = []
    with evaluating(reference, model), torch.inference_mode():
        for window in token_windows(tokenizer, text, sequence_length, max_tokens):
            targets = window[0, 1:]
            for rows, (expected, actual) in _log_probs({"reference": reference, "model": model}, first, window):
                if expected.shape != actual.shape:
                    raise ValueError(
                        f"model: expected the reference's vocabulary of {expected.shape[-1]} tokens, "
                        f"got {actual.shape[-1]}"
                    )
                reference_loss += _negative_log_likelihood(expected, targets[rows])
                loss += _negative_log_likelihood(actual, targets[rows])
                divergences.append(row_divergences(expected, actual))
                same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
    divergence = torch.cat(divergences)
    tokens = len(divergence)
    return Comparison(
        reference_perplexity=_perplexity("reference", reference_loss, tokens),
        perplexity=_perplexity("model", loss, tokens),
        kl_divergence=_finite("model: KL divergence", divergence.mean().item()),
        kl_99th_percentile=divergence.quantile(0.99).item(),
        kl_largest=divergence.max().item(),
        top1_agreement=same / tokens,
        tokens=tokens,
    )


@dataclass(frozen=True)
class OutputComparison:
    """A model's outputs compared with its reference's.

    `error` is the norm of the difference relative to the norm of the reference's outputs. For logits over classes or
    tokens, `kl_divergence` is the mean of ``KL(reference || model)`` in nats, and `top1_agreement` the share of
    predictions for which both models rank the same class first; else both are None. `samples` counts the calls.
    """

    error: float
    kl_divergence: float | None
    top1_agreement: float | None
    samples: int


def compare_outputs(
    reference: nn.Module, model: nn.Module, calls: Iterable[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]
) -> OutputComparison:
    """Call `reference` and `model` with the keyword arguments of each pair in `calls`, and compare their outputs.

    The outputs are those of `main_output`. Raises ValueError if there are no calls, the outputs differ in shape or are
    not finite, TypeError if there is no float output.
    """
    error = power = divergence = 0.0
    same = predictions = samples = 0
    with evaluating(reference, model), torch.inference_mode():
        for own, other in calls:
            (expected, are_logits), (actual, _) = (main_output(reference(**own)), main_output(model(**other)))
            if expected.shape != actual.shape:
                raise ValueError(f"model: expected outputs of shape {list(expected.shape)}, got {list(actual.shape)}")
            for name, values in (("reference", expected), ("model", actual)):
                if not values.isfinite().all():
                    raise ValueError(f"{name}: expected finite outputs, got NaN or infinity in call {samples}")
            error += (actual - expected).square().sum().item()
            power += expected.square().sum().item()
            samples += 1
            if are_logits:
                expected, actual = (x.reshape(-1, x.shape[-1]).log_softmax(-1) for x in (expected, actual))
                divergence += row_divergences(expected, actual).sum().item()
                same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
                predictions += len(expected)
    if not samples:
        raise ValueError("calls: expected at least one, got none")
    relative = math.sqrt(error / power) if power else math.inf * bool(error)
    if not predictions:
        return OutputComparison(relative, None, None, samples)
    return OutputComparison(relative, divergence / predictions, same / predictions, samples)


def main_output(output: object) -> tuple[torch.Tensor, bool]:
    """The logits of a model's `output`, or its first float tensor, in float32, and whether it is logits.

    Raises TypeError when there is none.
    """
    logits = getattr(output, "logits", None)
    are_logits = isinstance(logits, torch.Tensor)
    for leaf in [logits] if are_logits else tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.float(), are_logits and leaf.dim() > 0 and leaf.shape[-1] > 1
    raise TypeError("the model returns no float tensor to compare outputs by")


def decode_speed(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 64, repeats: int = 3
) -> float:
    """Tokens per second of greedy `model.generate` after its first token: the best of `repeats` runs.

    `model` is a transformers model that generates. The time of the prefill is not counted.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens: expected at least 2, got {new_tokens}")
    inputs = tokenizer(prompt, return_tensors="pt")
    best = 0.0
    with evaluating(model), torch.inference_mode():
        for _ in range(repeats):
            clock = _TokenClock()
            model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=clock
            )
            best = max(best, (new_tokens - 1) / (clock.times[-1] - clock.times[1]))
    return best


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, with packed weights; shared memory counts once.

    Modules with an attribute `nbytes`, such as quantized ones, count by it.
    """
    total = 0
    storages: dict[int, int] = {}
    for module in model.modules():
        if hasattr(module, "nbytes"):
            total += module.nbytes
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return total + sum(storages.values())


class _TokenClock(BaseStreamer):
    """Records the times at which `generate` gives the prompt and every new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _log_probs(
    models: dict[str, nn.Module], first: list[int], window: torch.Tensor
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Yield slices of a window's targets with the models' float32 log-probabilities ``[rows, vocabulary]`` for them.

    Models see `first` before the window. Raises ValueError, with the model's name, where they are NaN.
    """
    ids = torch.cat((torch.tensor([first], dtype=window.dtype), window[:, :-1]), dim=1)
    logits = {name: model(input_ids=ids).logits[0, len(first) :] for name, model in models.items()}
    for start in range(0, window.shape[1] - 1, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        found = [torch.log_softmax(each[rows].float(), dim=-1) for each in logits.values()]
        for name, log_probs in zip(logits, found, strict=True):
            bad = log_probs[:, 0].isnan().nonzero()  # of such logits the whole row is NaN
            if len(bad):
                place = f"token {start + int(bad[0])} of a window of {window.shape[1] - 1}"
                raise ValueError(f"{name}: expected finite logits, got NaN or infinity at {place}")
        yield rows, found


def row_divergences(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """``KL(expected || actual)`` of each row of log-probabilities, float64."""
    return nn.functional.kl_div(actual, expected, reduction="none", log_target=True).sum(-1).double()


def _negative_log_likelihood(log_probs: torch.Tensor, targets: torch.Tensor) -> float:
    return nn.functional.nll_loss(log_probs, targets, reduction="sum").item()


def _perplexity(name: str, loss: float, tokens: int) -> float:
    try:
        return _finite(f"{name}: perplexity", math.exp(loss / tokens))
    except OverflowError:
        return _finite(f"{name}: perplexity", math.inf)


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"{what}: expected a finite number, got {value}: a token that occurs has probability 0; look for a layer "
            "whose weights are broken"
        )
    return value
