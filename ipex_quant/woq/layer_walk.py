"""Quantize the linears of a transformer block by block, each seeing the quantized ones before it (true sequential).

The model itself is run up to the block in question, with the blocks before it replaced by what they returned last time.
So a block gets exactly the arguments that its model gives it, whatever they are, and only one block's inputs are held.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from ..nn.fused_forward import restored_forwards
from ..nn.linears import is_linear, weight_matrix
from ..nn.modes import evaluating
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .rtn import rtn

SchemeOf = Callable[[str], WeightScheme | None]
"""The scheme of a module by its name, None to leave it in float."""


class BlockQuantizer(Protocol):
    """What `walk_blocks` asks of an algorithm."""

    title: str

    def __call__(self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme]) -> dict[str, QuantizedWeight]:
        """Quantize the linears of block `index` by name within it, and give them the quantized weights.

        Those that no batch reaches are left out; so they have no part in what the block returns.
        """


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme | SchemeOf,
    quantize_block: BlockQuantizer,
    scale_dtype: torch.dtype = torch.float32,
) -> dict[str, QuantizedWeight]:
    """Quantize every linear in the transformer blocks of `model` with `quantize_block`; the result is by module name.

    `batches` are keyword arguments of the model. Linears outside the blocks (embeddings, lm_head) are not touched; one
    that no batch reaches is rounded to nearest, with a warning. The model comes back as it was. Raises ValueError
    without batches or blocks.
    """
    title = quantize_block.title
    if not batches:
        raise ValueError(f"batches: {title} needs at least one calibration batch")
    prefix, blocks = find_blocks(model)
    scheme_of = (lambda name: scheme) if isinstance(scheme, WeightScheme) else scheme
    quantized: dict[str, QuantizedWeight] = {}
    missed: list[str] = []
    with evaluating(model), restored_forwards(model), Walk(model, prefix, blocks, batches) as walk:
        for index, block in enumerate(tqdm(blocks, desc=title, unit="block")):
            names = {name: walk.full_name(index, name) for name, m in block.named_modules() if is_linear(m)}
            schemes = {name: scheme_of(full_name) for name, full_name in names.items()}
            schemes = {name: chosen for name, chosen in schemes.items() if chosen is not None}
            with _restored_parameters(block):
                found = quantize_block(walk, index, schemes)
                if index + 1 < len(blocks):
                    walk.advance(index)
            quantized |= {walk.full_name(index, name): weight for name, weight in found.items()}
            missed += [names[name] for name in schemes if name not in found]
    for name in missed:
        quantized[name] = rtn(weight_matrix(model.get_submodule(name)), scheme_of(name), scale_dtype)
    if missed:
        warnings.warn(
            f"{title}: no calibration sample reached {', '.join(missed)}; rounded to nearest instead", stacklevel=4
        )
    return quantized


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks: the ``nn.ModuleList`` whose linears hold the most weights.

    Raises ValueError when there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(is_linear(child) for child in module):
            continue
        size = sum(m.weight.numel() for m in module.modules() if is_linear(m))
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise ValueError(f"model: {type(model).__name__} has no nn.ModuleList of transformer blocks with linear layers")
    return best[1], best[2]


class _Stop(Exception):  # noqa: N818 - no error, it ends a forward pass whose rest is not needed
    """Carries what was waited for out of a forward pass."""

    def __init__(self, value: object = None) -> None:
        self.value = value


class Walk:
    """Runs single blocks of a model on every batch; a context manager, since it replaces forwards meanwhile."""

    def __init__(
        self, model: nn.Module, prefix: str, blocks: nn.ModuleList, batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        self.model, self.prefix, self.blocks, self.batches = model, prefix, blocks, batches
        self.outputs: list[object] = [None] * len(batches)  # of the last block passed, a batch
        self._replayed: object = None
        self._stack = ExitStack()
        parameters = inspect.signature(model.forward).parameters.values()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        # A cache would remember the blocks of earlier runs.
        self._options = {"use_cache": False} if takes_any or any(p.name == "use_cache" for p in parameters) else {}

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def full_name(self, index: int, name: str) -> str:
        """Name in the model of what is called `name` in block `index`."""
        return f"{self.prefix}.{index}.{name}"

    def run(self, index: int, batch_index: int) -> object:
        """What block `index` returns for one batch, or None when a hook stopped it; blocks before it are replayed."""
        self._replayed = self.outputs[batch_index]
        hook = self.blocks[index].register_forward_hook(_stop_with_output)
        try:
            self.model(**{**self.batches[batch_index], **self._options})
        except _Stop as stop:
            return stop.value
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} did not call block {index} of its transformer blocks")

    def advance(self, index: int) -> None:
        """Keep the outputs of block `index` and replay them from now on."""
        self.outputs = [self.run(index, batch_index) for batch_index in range(len(self.batches))]
        self._stack.enter_context(_forward_replaced(self.blocks[index], lambda *args, **kwargs: self._replayed))


def _stop_with_output(module: nn.Module, args: object, output: object) -> None:
    raise _Stop(output)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    own = vars(module).get("forward")  # some libraries wrap the forward of an instance
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _restored_parameters(block: nn.Module) -> Iterator[None]:
    data = {parameter: parameter.data for parameter in block.parameters()}
    try:
        yield
    finally:
        for parameter, tensor in data.items():
            parameter.data = tensor


@dataclass
class Stage:
    """Linears that do not depend on each other: `groups` of linears that share an input.

    `once` says that the first linear of the only group is called once, so that a forward pass may stop there.
    """

    groups: list[list[str]] = field(default_factory=list)
    once: bool = True


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Give the parameter new data: the old ones come back when the block is done."""
    linear.weight.data = torch.empty_like(linear.weight.data)
    weight_matrix(linear).copy_(weight)


def _calls(walk: Walk, index: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """Linears of a block in the order of their calls, each with a number for its input tensor.

    One batch tells, unless it leaves linears out (experts that no token chose).
    """
    block = walk.blocks[index]
    calls: list[tuple[str, int]] = []
    inputs: list[torch.Tensor] = []  # kept, so that no two get the same id

    def record(name: str, tensor: torch.Tensor) -> None:
        inputs.append(tensor)
        calls.append((name, id(tensor)))

    for batch_index in range(len(walk.batches)):
        known = {name for name, _ in calls}
        unknown = [name for name in names if name not in known]
        if not unknown:
            break
        with input_hooks({name: block.get_submodule(name) for name in unknown}, record):
            walk.run(index, batch_index)
    return calls


def find_stages(walk: Walk, index: int, names: Sequence[str]) -> list[Stage]:
    """Stages of the linears `names` of block `index`, in the order in which they are called."""
    return _stages(walk.blocks[index], _calls(walk, index, names))


def _stages(block: nn.Module, calls: Sequence[tuple[str, int]]) -> list[Stage]:
    """Group the called linears by shared input, and the groups that are alike (experts) into one stage."""
    groups: dict[int, list[str]] = {}
    placed: set[str] = set()
    repeated: set[str] = set()
    for name, tensor in calls:
        if name in placed:
            repeated.add(name)
        else:
            groups.setdefault(tensor, []).append(name)
            placed.add(name)
    stages: dict[str, Stage] = {}
    for members in groups.values():
        stage = stages.setdefault(_pattern(block, members[0]), Stage())
        stage.groups.append(members)
        stage.once = len(stage.groups) == 1 and not repeated.intersection(members)
    return list(stages.values())


def _pattern(block: nn.Module, name: str) -> str:
    """`name` with the index in every ``nn.ModuleList`` replaced by a star: what experts have in common."""
    parts = name.split(".")
    parents = [block.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return ".".join("*" if isinstance(p, nn.ModuleList) else part for p, part in zip(parents, parts, strict=True))


class Statistics(Protocol):
    """What an algorithm gathers about the inputs of a share group: `count` vectors so far."""

    count: int

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs ``[..., K]``."""


StatisticsT = TypeVar("StatisticsT", bound=Statistics)


def calibrate(walk: Walk, index: int, stage: Stage, make: Callable[[int], StatisticsT]) -> list[StatisticsT]:
    """What every share group of a stage gets as input, over all batches; ``make(K)`` makes what gathers it.

    Positions that a 2-D `attention_mask` masks are left out.
    """
    block = walk.blocks[index]
    firsts = {members[0]: block.get_submodule(members[0]) for members in stage.groups}
    sums = {name: make(weight_matrix(linear).shape[1]) for name, linear in firsts.items()}
    mask: torch.Tensor | None = None

    def add(name: str, tensor: torch.Tensor) -> None:
        try:
            sums[name].add(tensor if mask is None or tensor.shape[:-1] != mask.shape else tensor[mask])
        except ValueError as error:
            raise ValueError(f"{walk.full_name(index, name)}: {error}") from error
        if stage.once:
            raise _Stop  # nothing else in this block is needed

    with input_hooks(firsts, add):
        for batch_index, batch in enumerate(walk.batches):
            mask = batch.get("attention_mask")
            mask = mask.bool() if mask is not None and mask.dim() == 2 else None
            walk.run(index, batch_index)
    return list(sums.values())


@contextmanager
def input_hooks(linears: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before every call of each linear."""
    with ExitStack() as stack:
        for name, linear in linears.items():
            handle = linear.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: see(name, args[0] if args else kwargs["input"]),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield
