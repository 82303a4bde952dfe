"""Quantizes a transformer block by block; calibration of a linear runs on quantized layers before it (true sequential).

For each block, the model runs up to that block, and the blocks before it replay recorded outputs. The block thus gets
exactly the arguments that its model gives it. Only one recording per tower is held: of its latest block, or of the
module that holds the tower.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from ..nn.fused_forward import restored_forwards
from ..nn.linears import is_linear, linear_shape, weight_matrix
from ..nn.modes import evaluating
from ..nn.stored_linear import in_memory
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .rtn import rtn
from .towers import count_calls, find_towers, holder, merged_order, pattern

SchemeOf = Callable[[str], WeightScheme | None]
"""The scheme of a module by its name, None to leave it in float."""

Inputs = dict[str, list[torch.Tensor]]
"""The inputs of linear layers, by name, of all their calls for one batch."""

_KEPT_BYTES = 1 << 28
"""Bytes of inputs in the float model that are kept, so that a block need not run again for each of its stages."""


class BlockQuantizer(Protocol):
    """The interface of an algorithm for `walk_blocks`."""

    title: str

    def __call__(self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme]) -> dict[str, QuantizedWeight]:
        """Quantize the linears of block `index`, give them the quantized weights, return these by name in the block.

        The result leaves out linears that no batch reaches; they do not affect the block's outputs.
        """


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme | SchemeOf,
    quantize_block: BlockQuantizer,
    scale_dtype: torch.dtype = torch.float32,
    also: Sequence[str] = (),
) -> dict[str, QuantizedWeight]:
    """Quantize the linears in the transformer blocks of `model` with `quantize_block`; return weights by module name.

    `batches` are keyword arguments of the model. The walk visits the blocks of all towers (encoder and decoder, vision
    and text), and the linears outside of them that `also` names, in the order in which the model runs them. It skips
    blocks that no batch runs. In a visited block, a linear that no batch reaches is rounded to nearest, with a warning.
    The model is restored. Raises ValueError without batches or blocks, RuntimeError when no batch runs a block.
    """
    title = quantize_block.title
    if not batches:
        raise ValueError(f"batches: {title} needs at least one calibration batch")
    scheme_of = (lambda name: scheme) if isinstance(scheme, WeightScheme) else scheme
    quantized: dict[str, QuantizedWeight] = {}
    missed: list[str] = []
    with evaluating(model), restored_forwards(model), Walk(model, batches, also) as walk:
        for index, block in enumerate(tqdm(walk.blocks, desc=title, unit="block")):
            names = {name: walk.full_name(index, name) for name, m in block.named_modules() if is_linear(m)}
            schemes = {name: scheme_of(full_name) for name, full_name in names.items()}
            schemes = {name: chosen for name, chosen in schemes.items() if chosen is not None}
            with in_memory(block), walk.changing(index):
                found = quantize_block(walk, index, schemes)
                walk.advance(index)
            walk.leave(index)
            quantized |= {walk.full_name(index, name): weight for name, weight in found.items()}
            missed += [names[name] for name in schemes if name not in found]
    for name in missed:
        quantized[name] = rtn(weight_matrix(model.get_submodule(name)), scheme_of(name), scale_dtype)
    if missed:
        warnings.warn(
            f"{title}: no calibration sample reached {first_names(missed)}; rounded to nearest instead", stacklevel=4
        )
    if walk.silent:
        effect = "their weights are rounded to nearest"
        warnings.warn(f"{title}: {silent_channels(walk.silent, effect)}", stacklevel=4)
    return quantized


def silent_channels(layers: Mapping[str, tuple[int, int]], effect: str) -> str:
    """What a warning says of `layers`, by name with the number of input channels that are always 0, and of all."""
    told = [f"{name}: {channels} of {all_of_them}" for name, (channels, all_of_them) in layers.items()]
    count = sum(channels for channels, _ in layers.values())
    return (
        f"calibration leaves {count} input channels of {len(told)} layers at zero ({first_names(told)}): {effect}. "
        "Calibrate on more text, or text of more kinds"
    )


def first_names(names: Sequence[str], most: int = 8) -> str:
    """The first of `names` for a message, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


Recording = dict[str, dict[int, list[object]]]
"""Outputs by tower and batch, of the tower's latest block or its holder."""


class _Stop(Exception):  # noqa: N818 - no error, it ends a forward pass whose rest is not needed
    """Ends a forward pass."""


class Walk:
    """Runs single blocks of a model on every batch; replaces forwards, and restores them at the exit of its context.

    `blocks` holds the blocks of all towers and the modules `also` that run, in the order in which the model runs them.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], also: Sequence[str] = ()
    ) -> None:
        self.model, self.batches = model, batches
        self._options = _without_cache(model)
        towers = find_towers(model)
        tower_of = {f"{name}.{index}": name for name, blocks in towers.items() for index in range(len(blocks))}
        watched = {name: model.get_submodule(name) for name in (*tower_of, *also)}
        watched |= {name: module for name, module in model.named_modules() if any(map(_inside(name), towers))}
        watched.pop("", None)
        self._counts = count_calls(watched, batches, lambda batch: model(**{**batch, **self._options}))
        runs = merged_order([name for name in calls if name in tower_of or name in also] for calls in self._counts)
        if not any(name in tower_of for name in runs):
            raise RuntimeError(f"{type(model).__name__} did not call any of its transformer blocks")
        self.names = runs
        self.blocks = [model.get_submodule(name) for name in runs]
        self._towers = [tower_of.get(name, name) for name in runs]
        in_towers = [name for name in runs if name in tower_of]
        self._last = {tower: index for index, tower in enumerate(self._towers)}
        self._holders = {
            tower: holder(tower, in_towers, self._counts)
            for tower in towers
            if tower in self._last and tower_of[in_towers[-1]] != tower
        }
        self.silent: dict[str, tuple[int, int]] = {}  # input channels that are always 0, and all, by linear
        self._before: dict[nn.Parameter, torch.Tensor] = {}  # float parameters of the block that is changing
        self._kept: dict[nn.Parameter, torch.Tensor] = {}  # quantized parameters of a tower that has a holder
        self._outputs: Recording = {}
        self._float_outputs: Recording = {}  # if `record_float` is called
        self._float_now: dict[int, list[object]] = {}  # of the block that is changing
        self._linears_now: set[str] = set()  # of that block, which `record_float` has seen
        self._inputs_now: dict[int, Inputs] = {}  # of those in the float model, of the first batches
        self._in_float = False
        self._batch = 0
        self._played: Counter[nn.Module] = Counter()
        self._stacks = {tower: ExitStack() for tower in self._towers}
        decoder = model.get_decoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
        self._decoder = set() if decoder is None else set(decoder.modules())

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exception: object) -> None:
        for stack in self._stacks.values():
            stack.close()

    def full_name(self, index: int, name: str) -> str:
        """Name in the model of the module `name` of block `index`; '' is the block itself."""
        return f"{self.names[index]}.{name}" if name else self.names[index]

    def reached(self, index: int) -> list[int]:
        """Indices of the batches that run block `index`."""
        return [batch for batch, calls in enumerate(self._counts) if self.names[index] in calls]

    def run(self, index: int, batch_index: int) -> list[object]:
        """Outputs of every call of block `index` for one batch; a call that a hook stops has none."""
        return self._run(self.names[index], batch_index)

    def calls(self, index: int, batch_index: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Positional and keyword arguments of every call of block `index` for one batch."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        count = self._counts[batch_index][self.names[index]]

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((_copied(args), _copied(kwargs)))
            if len(calls) == count:
                raise _Stop

        handle = self.blocks[index].register_forward_pre_hook(see, with_kwargs=True)
        try:
            self._run_model(batch_index)
        finally:
            handle.remove()
        return calls

    def record_float(self, index: int) -> dict[int, list[object]]:
        """Outputs of block `index` in the float model, by batch, which `advance` records for later ones.

        To be called for every block in turn, or for none. Keeps the inputs of linear layers, of as many batches as
        `_KEPT_BYTES` hold, for `float_inputs`.
        """
        linears = {name: module for name, module in self.blocks[index].named_modules() if is_linear(module)}
        self._linears_now, self._inputs_now, self._float_now = set(linears), {}, {}
        room = _KEPT_BYTES
        for batch in self.reached(index):
            if room <= 0:
                self._float_now[batch] = self.run_float(index, batch)
                continue
            self._float_now[batch], inputs = self._run_seen(index, batch, linears, stop=False)
            different = {id(tensor): tensor.nbytes for tensors in inputs.values() for tensor in tensors}
            room -= sum(different.values())
            if room >= 0:
                self._inputs_now[batch] = inputs
        return self._float_now

    def float_inputs(self, index: int, batch_index: int, names: Sequence[str], stop: bool) -> Inputs:
        """Inputs of the linear layers `names` of block `index` in the float model, of those that see all positions.

        A linear layer that sees some of them, as an expert does, may see others in the quantized model. With `stop`,
        the first call is the last that is needed.
        """
        if batch_index in self._inputs_now and self._linears_now.issuperset(names):
            kept = self._inputs_now[batch_index]
            return {name: list(kept[name]) for name in names if name in kept}
        linears = {name: self.blocks[index].get_submodule(name) for name in names}
        return self._run_seen(index, batch_index, linears, stop)[1]

    def _run_seen(
        self, index: int, batch_index: int, linears: Mapping[str, nn.Module], stop: bool
    ) -> tuple[list[object], Inputs]:
        """`run_float`, and copies of the inputs of `linears` on the way; it ends at the first if `stop`."""
        inputs: Inputs = {}
        positions: set[int] = set()
        copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the originals, so that no two get the same id

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            width = leaves[0].shape[-1:] if leaves else None  # of hidden states: its own, and those it attends to
            positions.update(leaf.shape[:-1].numel() for leaf in leaves if leaf.shape[-1:] == width)

        def see(name: str, tensor: torch.Tensor) -> None:
            inputs.setdefault(name, []).append(copies.setdefault(id(tensor), (tensor, tensor.clone()))[1])
            if stop:
                raise _Stop  # nothing else in this block is needed

        handle = self.blocks[index].register_forward_pre_hook(count, with_kwargs=True)
        try:
            with input_hooks(linears, see):
                outputs = self.run_float(index, batch_index)
        finally:
            handle.remove()
        complete = {
            name: tensors
            for name, tensors in inputs.items()
            if all(tensor.shape[:-1].numel() in positions for tensor in tensors)
        }
        return outputs, complete

    def run_float(self, index: int, batch_index: int) -> list[object]:
        """As `run`, with the weights and inputs that block `index` has in the float model."""
        with _data_of(self._before), self._playing_float():
            return self.run(index, batch_index)

    @contextmanager
    def _playing_float(self) -> Iterator[None]:
        self._in_float = True
        try:
            yield
        finally:
            self._in_float = False

    def masks(self, index: int, batch_index: int) -> list[torch.Tensor]:
        """The 2-D masks of one batch, as bools, that may fit the inputs of block `index`."""
        batch = self.batches[batch_index]
        masks = [batch.get("attention_mask")]
        if self.blocks[index] in self._decoder:
            own = batch.get("decoder_input_ids", batch.get("decoder_inputs_embeds"))
            across = [] if own is None or masks[0] is None or own.shape[:2] == masks[0].shape else masks
            masks = [batch.get("decoder_attention_mask"), *across]
        return [mask.bool() for mask in masks if mask is not None and mask.dim() == 2]

    @contextmanager
    def changing(self, index: int) -> Iterator[None]:
        """Restore the current values of the parameters of block `index` at the exit of the context."""
        self._before = {parameter: parameter.data for parameter in self.blocks[index].parameters()}
        try:
            yield
        finally:
            for parameter, data in self._before.items():
                if self._holders.get(self._towers[index]) and parameter.data_ptr() != data.data_ptr():
                    self._kept[parameter] = parameter.data
                parameter.data = data
            self._before = {}

    def advance(self, index: int) -> None:
        """Record the outputs of block `index`, and replay them in later runs; does nothing for the last block."""
        self._inputs_now = {}
        if index + 1 == len(self.blocks):
            return
        tower = self._towers[index]
        if self._float_now:
            self._float_outputs[tower] = {**self._float_outputs.get(tower, {}), **self._float_now}
            self._float_now = {}
        outputs = self._outputs.setdefault(tower, {})
        for batch in self.reached(index):  # one at a time: those of the block before are needed no more
            outputs[batch] = self.run(index, batch)
        self._replay(tower, self.blocks[index])

    def leave(self, index: int) -> None:
        """After the last block of a tower, replay the outputs of the tower's holder instead of its blocks.

        The rest of the model may read more than the last block's output: that of a norm, or of earlier blocks.
        """
        tower = self._towers[index]
        name = self._holders.get(tower)
        if self._last[tower] != index or name is None:
            return
        self._stacks[tower].close()
        batches = [batch for batch, calls in enumerate(self._counts) if name in calls]
        if tower in self._float_outputs:
            with self._playing_float():
                self._float_outputs[tower] = {batch: self._run(name, batch) for batch in batches}
        with _data_of(self._kept):
            self._outputs[tower] = {batch: self._run(name, batch) for batch in batches}
        self._kept.clear()
        self._replay(tower, self.model.get_submodule(name))

    def _run(self, name: str, batch_index: int) -> list[object]:
        """Outputs of every call of a module for one batch; a call that a hook stops has none."""
        outputs: list[object] = []
        count = self._counts[batch_index][name]

        def keep(module: nn.Module, args: object, output: object) -> None:
            outputs.append(_copied(output))
            if len(outputs) == count:
                raise _Stop

        hook = self.model.get_submodule(name).register_forward_hook(keep)
        try:
            self._run_model(batch_index)
        finally:
            hook.remove()
        return outputs

    def _run_model(self, batch_index: int) -> None:
        """Run the model on one batch, until a hook stops it."""
        self._batch = batch_index
        self._played.clear()
        with suppress(_Stop):
            self.model(**{**self.batches[batch_index], **self._options})

    def _replay(self, tower: str, module: nn.Module) -> None:
        def forward(*args: object, **kwargs: object) -> object:
            recording = self._float_outputs if self._in_float else self._outputs
            outputs = recording[tower][self._batch]
            self._played[module] += 1
            return _copied(outputs[min(self._played[module], len(outputs)) - 1])

        self._stacks[tower].enter_context(_forward_replaced(module, forward))


@contextmanager
def _data_of(values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Give parameters other `values` within the context."""
    with ExitStack() as stack:
        for parameter, data in values.items():
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = data
        yield


def _copied(output: object) -> object:
    """A copy of `output`, its tensors and containers, since its reader may write to them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, copy.copy(output))


def _inside(name: str) -> Callable[[str], bool]:
    return lambda tower: tower.startswith(f"{name}.")


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep `model` from using a cache, which would remember the blocks of earlier runs."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = any(p.name == "use_cache" for p in parameters)
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if named or (takes_any and hasattr(getattr(model, "config", None), "use_cache")) else {}


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


@dataclass
class Stage:
    """Linears that do not depend on each other, in `groups` that share an input.

    `once`: the stage is one group whose linears are called once each, so that a forward pass may stop at the first.
    """

    groups: list[list[str]] = field(default_factory=list)
    once: bool = True


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Write `weight` to new memory of the parameter, since `Walk.changing` restores the old memory."""
    linear.weight.data = torch.empty_like(linear.weight.data)
    weight_matrix(linear).copy_(weight)


def _calls(walk: Walk, index: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """Linears of a block in the order of their calls, each with the id of its input tensor.

    Further batches run only for linears that no earlier batch called (experts that no token chose).
    """
    block = walk.blocks[index]
    calls: list[tuple[str, int]] = []
    inputs: list[torch.Tensor] = []  # kept, so that no two get the same id

    def record(name: str, tensor: torch.Tensor) -> None:
        inputs.append(tensor)
        calls.append((name, id(tensor)))

    for batch_index in walk.reached(index):
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
        stage = stages.setdefault(pattern(block, members[0]), Stage())
        stage.groups.append(members)
        stage.once = len(stage.groups) == 1 and not repeated.intersection(members)
    return list(stages.values())


class Statistics(Protocol):
    """Statistics of the inputs of a share group."""

    @property
    def count(self) -> int:
        """Number of input vectors so far."""

    @property
    def power(self) -> torch.Tensor:
        """A number ``[K]`` for each input channel that is 0 if all its inputs were, else above 0."""

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs ``[..., K]``."""


class PairStatistics(Protocol):
    """Statistics of the inputs of a share group in the quantized and in the float model."""

    @property
    def count(self) -> int:
        """Number of input vectors so far."""

    @property
    def power(self) -> torch.Tensor:
        """A number ``[K]`` for each input channel that is 0 if all its inputs were, else above 0."""

    def add(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None) -> None:
        """Take in a batch of inputs ``[..., K]``, and what they are in the float model, or None if not known."""


StatisticsT = TypeVar("StatisticsT", bound=Statistics)
PairsT = TypeVar("PairsT", bound=PairStatistics)


def calibrate(walk: Walk, index: int, stage: Stage, make: Callable[[int], StatisticsT]) -> list[StatisticsT]:
    """Collect the input statistics of every share group of a stage over all batches; ``make(K)`` makes an empty one.

    They leave out positions that a 2-D `attention_mask` masks (`decoder_attention_mask` in the decoder of an encoder-
    decoder model). A ValueError from the statistics is raised with the name of the linear.
    """
    sums = _empty(walk.blocks[index], stage, make)
    _see_inputs(walk, index, stage, lambda name, inputs, _: sums[name].add(inputs))
    _note_silent(walk, index, sums)
    return list(sums.values())


def calibrate_pairs(walk: Walk, index: int, stage: Stage, make: Callable[[int], PairsT]) -> list[PairsT]:
    """As `calibrate`, with statistics that take each input with that of the float model.

    `Walk.record_float` must have been called for all blocks before.
    """
    sums = _empty(walk.blocks[index], stage, make)
    _see_inputs(walk, index, stage, lambda name, inputs, floats: sums[name].add(inputs, floats), in_pairs=True)
    _note_silent(walk, index, sums)
    return list(sums.values())


def _note_silent(walk: Walk, index: int, sums: Mapping[str, Statistics | PairStatistics]) -> None:
    """Let `walk` know which linears have input channels that are always 0."""
    for name, seen in sums.items():
        silent = int((seen.power == 0).sum()) if seen.count else 0
        if silent:
            walk.silent[walk.full_name(index, name)] = silent, len(seen.power)


_T = TypeVar("_T")


def _empty(block: nn.Module, stage: Stage, make: Callable[[int], _T]) -> dict[str, _T]:
    return {members[0]: make(linear_shape(block.get_submodule(members[0]))[1]) for members in stage.groups}


def _see_inputs(
    walk: Walk,
    index: int,
    stage: Stage,
    see: Callable[[str, torch.Tensor, torch.Tensor | None], None],
    in_pairs: bool = False,
) -> None:
    """Call ``see(name, input, input in the float model)`` for the first linear of every share group and each call."""
    firsts = {members[0]: walk.blocks[index].get_submodule(members[0]) for members in stage.groups}
    masks: list[torch.Tensor] = []
    floats: dict[str, list[torch.Tensor]] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        mask = next((mask for mask in masks if mask.shape == tensor.shape[:-1]), None)
        other = floats[name].pop(0) if floats.get(name) else None
        if mask is not None:
            tensor, other = tensor[mask], None if other is None else other[mask]
        try:
            see(name, tensor, other)
        except ValueError as error:
            raise ValueError(f"{walk.full_name(index, name)}: {error}") from error
        if stage.once:
            raise _Stop  # nothing else in this block is needed

    for batch_index in walk.reached(index):
        masks = walk.masks(index, batch_index)
        floats = walk.float_inputs(index, batch_index, list(firsts), stage.once) if in_pairs else {}
        with input_hooks(firsts, add):
            walk.run(index, batch_index)


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
