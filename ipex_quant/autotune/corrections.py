"""`measured_factors`: corrects estimated errors of layers by the divergence that a few of them, together, have.

The estimate of `divergence` sees one layer and one position at a time. What a layer's errors do to later positions, and
to the layers above, makes it too large in some blocks and too small in others, by up to three times. So each
transformer block is quantized alone, and each kind of layer in all blocks, with one scheme, and the divergence
measured. A factor for each block and one for each kind are fitted to that (iterative proportional fitting).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from ..conversion.example import Example
from ..evaluation import main_output, row_divergences
from ..nn.embeddings import is_embedding
from ..nn.fused_forward import restored_forwards
from ..nn.linears import oriented
from ..nn.modes import evaluating
from ..woq.towers import find_towers, pattern

LOGITS = 1 << 26
"""Largest number of the float model's logits that are kept to compare with; one batch is, whatever its size."""

TOKENS = 2048
"""Number of predictions that are enough to compare."""

_ROUNDS = 50
_SPREAD = 8.0
"""Largest factor, and the inverse of the smallest: beyond it, noise was measured."""


def measured_factors(
    model: nn.Module,
    batches: Sequence[Example],
    groups: Mapping[str, Sequence[str]],
    errors: Mapping[str, float],
    weight_of: Callable[[str], torch.Tensor],
) -> dict[str, float]:
    """Factors of the estimated `errors` of `groups` of modules, by the name of the group.

    ``weight_of(name)`` is the weight ``[N, K]`` of a module that the error is of. Groups outside of transformer blocks
    are measured one by one. `model` is unchanged afterwards.
    """
    blocks = {f"{tower}.{i}" for tower, modules in find_towers(model).items() for i in range(len(modules))}
    block_of = {name: next((block for block in blocks if name.startswith(f"{block}.")), name) for name in groups}
    kind_of = {name: pattern(model, name) for name in groups}
    with restored_forwards(model), evaluating(model), torch.inference_mode():
        compare = _Comparison(model, batches)

        def measure(names: Sequence[str]) -> float:
            weights = {each: weight_of(each) for name in names for each in groups[name]}
            with _replaced(model, weights):
                return compare()

        measured = {}
        for part in tqdm(_parts(block_of, kind_of), "measuring divergences"):
            measured[part] = measure(part)
    return _fitted(errors, measured)


def _parts(*keys: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The distinct sets of names that have a key in common."""
    found: dict[tuple[str, ...], None] = {}
    for key in keys:
        sets = defaultdict(list)
        for name, value in key.items():
            sets[value].append(name)
        found |= dict.fromkeys(tuple(names) for names in sets.values())
    return list(found)


def _fitted(errors: Mapping[str, float], measured: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Factors, one for each set of names times another, with which sums of `errors` are as `measured`."""
    factors = dict.fromkeys(errors, 1.0)
    for _ in range(_ROUNDS):
        for names, divergence in measured.items():
            total = sum(errors[name] * factors[name] for name in names)
            ratio = divergence / total if total > 0 and divergence > 0 else 1.0
            for name in names:
                factors[name] *= ratio
    return {name: min(max(factor, 1 / _SPREAD), _SPREAD) for name, factor in factors.items()}


class _Comparison:
    """The mean divergence of a model's predictions from those that it makes when this is constructed."""

    def __init__(self, model: nn.Module, batches: Sequence[Example]) -> None:
        self.model = model
        self.batches: list[Example] = []
        self.expected: list[torch.Tensor] = []
        kept = 0
        for batch in batches:
            expected = self._log_probs(batch)
            kept += expected.numel()
            if self.expected and kept > LOGITS:
                break
            self.batches.append(batch)
            self.expected.append(expected)
            if sum(map(len, self.expected)) >= TOKENS:
                break

    def __call__(self) -> float:
        total = 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            actual = self._log_probs(batch)
            total += float(row_divergences(expected, actual).sum())
        return total / sum(map(len, self.expected))

    def _log_probs(self, batch: Example) -> torch.Tensor:
        logits = main_output(self.model(*batch.args, **batch.kwargs))[0]
        return logits.reshape(-1, logits.shape[-1]).log_softmax(-1)


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give modules other `weights` ``[N, K]`` inside the context."""
    parameters = {name: model.get_submodule(name).weight for name in weights}
    before = {parameter: parameter.data for parameter in parameters.values()}
    try:
        for name, weight in weights.items():
            module = model.get_submodule(name)
            new = weight if is_embedding(module) else oriented(module, weight)
            parameters[name].data = new.to(parameters[name].dtype)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
