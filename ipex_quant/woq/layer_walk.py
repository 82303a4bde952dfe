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

import torch
from torch import nn
from tqdm import tqdm

from ..nn.fused_forward import restored_forwards
from ..nn.linears import is_linear, weight_matrix
from ..nn.modes import evaluating
from ..numerics.affine import dequantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .gptq import GptqOptions, HessianAccumulator, quantize_weight
from .rtn import rtn

SchemeOf = Callable[[str], WeightScheme | None]
"""The scheme of a module by its name, None to leave it in float."""


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme | SchemeOf,
    options: GptqOptions | None = None,
) -> dict[str, QuantizedWeight]:
    """GPTQ for every linear in the transformer blocks of `model`, by module name.

    `batches` are keyword arguments of the model. Positions that a 2-D `attention_mask` masks are left out of the
    calibration. Linears outside the blocks (embeddings, lm_head) are not touched; one that no batch reaches is rounded
    to nearest, with a warning. The model comes back as it was. Raises ValueError without batches or blocks.
    """
    if not batches:
        raise ValueError("batches: GPTQ needs at least one calibration batch")
    prefix, blocks = find_blocks(model)
    options = options or GptqOptions()
    scheme_of = (lambda name: scheme) if isinstance(scheme, WeightScheme) else scheme
    quantized: dict[str, QuantizedWeight] = {}
    missed: list[str] = []
    with evaluating(model), restored_forwards(model), _Walk(model, blocks, batches) as walk:
        for index, block in enumerate(tqdm(blocks, desc="GPTQ", unit="block")):
            names = {name: f"{prefix}.{index}.{name}" for name, m in block.named_modules() if is_linear(m)}
            schemes = {name: scheme_of(full_name) for name, full_name in names.items()}
            schemes = {name: chosen for name, chosen in schemes.items() if chosen is not None}
            with _restored_weights(block, schemes):
                found = _quantize_block(walk, index, schemes, options)
                if index + 1 < len(blocks):
                    walk.advance(index)
            quantized |= {names[name]: weight for name, weight in found.items()}
            missed += [names[name] for name in schemes if name not in found]
    for name in missed:
        weight = weight_matrix(model.get_submodule(name))
        quantized[name] = rtn(weight, scheme_of(name), options.scale_dtype)
    if missed:
        warnings.warn(
            f"GPTQ: no calibration sample reached {', '.join(missed)}; rounded to nearest instead", stacklevel=3
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


class _Walk:
    """Runs single blocks of a model on every batch; a context manager, since it replaces forwards meanwhile."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.outputs: list[object] = [None] * len(batches)  # of the last block passed, a batch
        self._replayed: object = None
        self._stack = ExitStack()
        parameters = inspect.signature(model.forward).parameters.values()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        # A cache would remember the blocks of earlier runs.
        self._options = {"use_cache": False} if takes_any or any(p.name == "use_cache" for p in parameters) else {}

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

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
def _restored_weights(block: nn.Module, names: Mapping[str, object]) -> Iterator[None]:
    weights = {name: block.get_submodule(name).weight.data for name in names}
    try:
        yield
    finally:
        for name, weight in weights.items():
            block.get_submodule(name).weight.data = weight


@dataclass
class _Stage:
    """Linears that do not depend on each other: `groups` of linears that share an input.

    `once` says that the first linear of the only group is called once, so that a forward pass may stop there.
    """

    groups: list[list[str]] = field(default_factory=list)
    once: bool = True


def _quantize_block(
    walk: _Walk, index: int, schemes: Mapping[str, WeightScheme], options: GptqOptions
) -> dict[str, QuantizedWeight]:
    """Quantize the linears of one block by name within it, stage by stage, and give them the quantized weights.

    Those that no batch reaches are left out; so they have no part in what the block returns.
    """
    block = walk.blocks[index]
    found: dict[str, QuantizedWeight] = {}
    for stage in _stages(block, _calls(walk, index, list(schemes))):
        for members, seen in zip(stage.groups, _calibrate(walk, index, stage), strict=True):
            for name in members if seen.count else ():
                linear = block.get_submodule(name)
                found[name] = quantize_weight(weight_matrix(linear), seen.hessian, schemes[name], options)
                _set_weight(linear, dequantize(found[name]))
    return found


def _set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Give the parameter new data: the old ones come back when the block is done."""
    linear.weight.data = torch.empty_like(linear.weight.data)
    weight_matrix(linear).copy_(weight)


def _calls(walk: _Walk, index: int, names: Sequence[str]) -> list[tuple[str, int]]:
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
        with _input_hooks({name: block.get_submodule(name) for name in unknown}, record):
            walk.run(index, batch_index)
    return calls


def _stages(block: nn.Module, calls: Sequence[tuple[str, int]]) -> list[_Stage]:
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
    stages: dict[str, _Stage] = {}
    for members in groups.values():
        stage = stages.setdefault(_pattern(block, members[0]), _Stage())
        stage.groups.append(members)
        stage.once = len(stage.groups) == 1 and not repeated.intersection(members)
    return list(stages.values())


def _pattern(block: nn.Module, name: str) -> str:
    """`name` with the index in every ``nn.ModuleList`` replaced by a star: what experts have in common."""
    parts = name.split(".")
    parents = [block.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return ".".join("*" if isinstance(p, nn.ModuleList) else part for p, part in zip(parents, parts, strict=True))


def _calibrate(walk: _Walk, index: int, stage: _Stage) -> list[HessianAccumulator]:
    """What every share group of a stage gets as input, over all batches."""
    block = walk.blocks[index]
    firsts = {members[0]: block.get_submodule(members[0]) for members in stage.groups}
    sums = {name: HessianAccumulator(weight_matrix(linear).shape[1]) for name, linear in firsts.items()}
    mask: torch.Tensor | None = None

    def add(name: str, tensor: torch.Tensor) -> None:
        sums[name].add(tensor if mask is None or tensor.shape[:-1] != mask.shape else tensor[mask])
        if stage.once:
            raise _Stop  # nothing else in this block is needed

    with _input_hooks(firsts, add):
        for batch_index, batch in enumerate(walk.batches):
            mask = batch.get("attention_mask")
            mask = mask.bool() if mask is not None and mask.dim() == 2 else None
            walk.run(index, batch_index)
    return list(sums.values())


@contextmanager
def _input_hooks(linears: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before every call of each linear."""
    with ExitStack() as stack:
        for name, linear in linears.items():
            handle = linear.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: see(name, args[0] if args else kwargs["input"]),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield
