"""AutoRound for every linear in the transformer blocks of a model: each block is tuned as a whole.

A block starts from what GPTQ finds, and is tuned on the inputs that the quantized blocks before it give, towards the
outputs that it has in the float model. So it also corrects errors of the blocks before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from tqdm import tqdm

from .. import ops
from ..nn.linears import oriented, weight_matrix
from ..numerics.affine import dequantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .auto_round import AutoRoundOptions, TunedWeight
from .finished_blocks import FinishedBlocks
from .gptq import GptqOptions
from .gptq_blocks import compensate_block
from .layer_walk import SchemeOf, Walk, set_weight, walk_blocks

logger = logging.getLogger("ipex_quant")


def auto_round_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    scheme: WeightScheme | SchemeOf,
    options: AutoRoundOptions | None = None,
    work_dir: Path | None = None,
) -> dict[str, QuantizedWeight]:
    """AutoRound for the linears in the transformer blocks of `model`, as `walk_blocks` does it.

    Batches are merged into ones of `options.batch_size` samples where they fit together. Memory holds the inputs and
    outputs of one block for all of them, in the quantized and in the float model. Matmuls are in bfloat16 where the CPU
    multiplies it. With `work_dir`, finished blocks are kept there, as `FinishedBlocks` does it, and later runs go on
    after them. Raises as `walk_blocks` and `FinishedBlocks` do, ValueError for a weight that cannot be tuned, and
    RuntimeError when a loss is NaN or Inf; both name the layer.
    """
    options = options or AutoRoundOptions()
    merged = merged_batches(batches, options.batch_size)
    finished = None if work_dir is None else FinishedBlocks(work_dir, options, merged)
    return walk_blocks(model, merged, scheme, _AutoRoundBlocks(options, finished), options.scale_dtype)


def merged_batches(batches: Sequence[Mapping[str, Any]], samples: int) -> list[Mapping[str, Any]]:
    """Neighbouring `batches` joined along the first dimension, up to `samples` rows.

    Only batches of tensors with one row per sample, which agree in names, dtypes and the other dimensions, are joined.
    """
    merged: list[list[Mapping[str, Any]]] = []
    rows, last = 0, None
    for batch in batches:
        count, form = _form(batch)
        if form is None or form != last or rows + count > samples:
            merged.append([])
            rows = 0
        merged[-1].append(batch)
        rows, last = rows + count, form
    return [
        {name: torch.cat([each[name] for each in group]) for name in group[0]} if len(group) > 1 else group[0]
        for group in merged
    ]


def _form(batch: Mapping[str, Any]) -> tuple[int, object]:
    """Number of samples of `batch`, and what another must have in common with it; None if it cannot be joined."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()]
    counts = {len(tensor) for tensor in tensors}
    if len(tensors) < len(batch) or len(counts) != 1:
        return 1, None
    return counts.pop(), {name: (value.shape[1:], value.dtype) for name, value in batch.items()}


@dataclass(frozen=True)
class _Call:
    """One call of a block with float32 arguments, the output that it should have, and which positions count."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: torch.Tensor
    mask: torch.Tensor | None

    def loss(self, block: nn.Module) -> torch.Tensor:
        """Mean squared error of the output; matmuls are in bfloat16 where that is faster."""
        with torch.autocast("cpu", torch.bfloat16, enabled=ops.multiplies_bfloat16()):
            output = _hidden(block(*self.args, **self.kwargs))
        errors = (output.float() - self.target).square()
        return errors.mean() if self.mask is None else errors[self.mask].mean()


class _AutoRoundBlocks:
    title = "AutoRound"

    def __init__(self, options: AutoRoundOptions, finished: FinishedBlocks | None) -> None:
        self.options, self.finished = options, finished
        # Tuning moves weights from the values that were rounded, with the scales that rounded them.
        self._gptq = GptqOptions(scale_dtype=options.scale_dtype, refit=False)

    def __call__(self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme]) -> dict[str, QuantizedWeight]:
        block, name = walk.blocks[index], walk.names[index]
        linears = {each: block.get_submodule(each) for each in schemes}
        outputs = walk.record_float(index)
        found = None if self.finished is None else self.finished.load(name, block, schemes)
        if found is None:
            found = self._tune(walk, index, schemes, _calls(walk, index, outputs))
            if self.finished is not None:
                self.finished.save(found)
        for each, weight in found.items():
            set_weight(linears[each], dequantize(weight))
        return found

    def _tune(
        self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme], calls: Sequence[_Call]
    ) -> dict[str, QuantizedWeight]:
        block = walk.blocks[index]
        started = compensate_block(walk, index, schemes, self._gptq)
        tuned = {
            name: TunedWeight(compensated, schemes[name], self.options.scale_dtype, start)
            for name, (start, compensated) in started.items()
        }
        if not tuned or not calls:
            return {}
        with _trainable(block, tuned):
            _tune_block(block, tuned, calls, self.options, walk.names[index])
        return {name: weight.quantized_weight() for name, weight in tuned.items()}


def _tune_block(
    block: nn.Module,
    tuned: Mapping[str, TunedWeight],
    calls: Sequence[_Call],
    options: AutoRoundOptions,
    title: str,
) -> None:
    """Tune the weights `tuned` of `block`; they stay as they were if that does not lower the loss of all calls."""
    linears = {name: block.get_submodule(name) for name in tuned}
    order = _passes(len(calls), torch.Generator().manual_seed(options.seed))
    start = [parameter.clone() for weight in tuned.values() for parameter in weight.parameters]
    before = _mean_loss(block, tuned, calls, title)
    for step in tqdm(range(options.steps), desc=title, unit="step", leave=False):
        _set_values(block, tuned)
        with torch.enable_grad():
            loss = calls[next(order)].loss(block)
            loss.backward()
        _check_loss(loss.item(), title)
        rate = options.rate_at(step)
        for name, linear in linears.items():
            if linear.weight.grad is not None:
                tuned[name].step(oriented(linear, linear.weight.grad), rate, rate * options.clip_rate)
                linear.weight.grad = None
    after = _mean_loss(block, tuned, calls, title)
    logger.info("AutoRound: %s: mean squared error %.3g, before %.3g", title, after, before)
    if after > before:
        parameters = [parameter for weight in tuned.values() for parameter in weight.parameters]
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)


def _set_values(block: nn.Module, tuned: Mapping[str, TunedWeight]) -> None:
    for name, weight in tuned.items():
        weight_matrix(block.get_submodule(name)).copy_(weight.values())


def _mean_loss(block: nn.Module, tuned: Mapping[str, TunedWeight], calls: Sequence[_Call], title: str) -> float:
    _set_values(block, tuned)
    return _check_loss(sum(call.loss(block).item() for call in calls) / len(calls), title)


def _check_loss(loss: float, title: str) -> float:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"{title}: the loss is {loss}; check that the model's outputs for the calibration data are finite"
        )
    return loss


def _passes(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers below `count`, each once in every pass, in random orders."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def _trainable(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the context, the parameters of `block` are float32 copies; only weights of the linears `names` learn."""
    before = {each: (each.data, each.grad, each.requires_grad) for each in block.parameters() if _is_float(each)}
    try:
        for parameter in before:
            parameter.grad = None
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(False)
        for name in names:
            block.get_submodule(name).weight.requires_grad_(True)
        yield
    finally:
        for parameter, (data, gradient, wants_gradient) in before.items():
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient
            parameter.requires_grad_(wants_gradient)


def _calls(walk: Walk, index: int, outputs: Mapping[int, Sequence[object]]) -> list[_Call]:
    """The calls of block `index` for all batches, with the `outputs` of the float model as targets."""
    calls: list[_Call] = []
    for batch, expected in outputs.items():
        masks = walk.masks(index, batch)
        for (args, kwargs), output in zip(walk.calls(index, batch), expected, strict=True):
            target = _hidden(output).float()
            mask = next((each for each in masks if each.shape == target.shape[:-1]), None)
            if mask is not None and not mask.any():
                continue
            args, kwargs = tree_map(_widened, (args, kwargs))
            kwargs = _shared(kwargs, calls[-1].kwargs) if calls else kwargs
            calls.append(_Call(args, kwargs, target, mask))
    return calls


def _shared(tree: Any, other: Any) -> Any:
    """`tree` with the tensors of `other` in the place of equal ones: masks and angles that samples have in common."""
    leaves, form = tree_flatten(tree)
    others, other_form = tree_flatten(other)
    if form != other_form:
        return tree
    same = [
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.equal(b)
        for a, b in zip(leaves, others, strict=True)
    ]
    return tree_unflatten([b if equal else a for a, b, equal in zip(leaves, others, same, strict=True)], form)


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _widened(leaf: Any) -> Any:
    return leaf.float() if _is_float(leaf) else leaf


def _hidden(output: object) -> torch.Tensor:
    """The hidden states in a block's output: its first float tensor."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise TypeError(f"AutoRound: expected a block to return a float tensor, got a {type(output).__name__}")
