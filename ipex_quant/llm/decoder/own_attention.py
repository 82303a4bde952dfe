"""Attention of models whose code transformers does not have: what a module computes is found by trial.

A trial runs the module's own code on random numbers and compares what it makes of them with each of a few conventions.
Only modules without other state than their linear layers are tried, so that what holds for these numbers holds for all.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import ops
from ...nn.fused_forward import restore_forwards
from ..cache.layers import NativeLayer
from .linears import linear_call, linear_calls
from .own_mlp import own_modules
from .trial import StandIn, features, linear_children, others_have_hooks, same, with_stand_ins
from .watched_forward import WatchedForward

_NAMES = {
    "mask": ("attention_mask", "mask"),
    "rotation": ("rotary_pos_emb", "rope_cache", "rotary_embedding"),
    "positions": ("position_ids",),
    "past": ("kv_cache", "past_key_value", "layer_past"),
    "use_cache": ("use_cache",),
}
"""Names that arguments have, by what they are for; the first argument is the hidden states."""

_LAYER = "_ipex_quant_layer"
"""Attribute of returned keys: the `NativeLayer` that holds them."""

_LONGEST = 8192
"""Most tokens in a trial."""


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries ``[B, L, H, D]``, keys and values ``[B, L, Hkv, D]``."""


class Call(NamedTuple):
    """The arguments of an attention module beside the hidden states."""

    mask: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    past: Any = None
    use_cache: bool = False


@dataclass(frozen=True)
class Convention:
    """How a module joins its linears, and how it takes and returns tensors.

    - `inputs` names the projections, query, key and value, or the one with all of them; `output` the last linear.
    - `grouped`: in a joined projection, every key head lies behind its query heads, and its value head behind it.
    - `sequence_first`: hidden states are ``[L, B, K]``; else ``[B, L, K]``.
    - `axes` are those of returned keys and values, a permutation of "bhld".
    - `rotated`: neighbours among the first R features turn by an argument ``[L, B or 1, R / 2, 2]`` (``[B or 1, L, R /
      2, 2]`` without `sequence_first`), cosine and sine.
    - `rotary` names a module that is called with values ``[B, Hkv, L, D]`` and `seq_len`, and returns cosines and sines
      ``[.., R]`` of all positions; features R / 2 apart turn.
    - `masks`: a bool mask is true where a key is hidden, a float mask (float32 for any) is added to the scores. With
      `last_row`, a single query takes the last row of a mask of more rows.
    - `causal`: without a mask and a past, queries see no later keys.
    - `result` is what the module returns: "output", "present" or None in each place.
    """

    inputs: tuple[str, ...]
    output: str
    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    sequence_first: bool
    axes: str
    rotated: bool = False
    rotary: str = ""
    causal: bool = False
    masks: frozenset[torch.dtype] = frozenset()
    last_row: bool = False
    result: tuple[str | None, ...] = ()

    def heads_of(self, projected: list[torch.Tensor]) -> Heads:
        """Queries ``[B, L, H, D]``, keys and values ``[B, L, Hkv, D]``."""
        heads = [each.unflatten(-1, (-1, self.head_size)) for each in projected]
        if self.sequence_first:
            heads = [each.transpose(0, 1) for each in heads]
        if len(heads) == 3:
            return heads[0], heads[1], heads[2]
        if self.grouped:
            groups = heads[0].unflatten(2, (self.key_heads, -1))
            return groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]
        query, key, value = heads[0].split((self.heads, self.key_heads, self.key_heads), dim=2)
        return query, key, value

    def rotate(self, module: nn.Module, heads: Heads, call: Call) -> Heads:
        """Queries and keys rotated, as `module` does, and the values."""
        query, key, value = heads
        if self.rotary:
            length = value.shape[1] + (0 if call.past is None else call.past[0].shape[self.axes.index("l")])
            tables = module._modules[self.rotary](value.transpose(1, 2), seq_len=length)
            cos, sin = (each.reshape(-1, each.shape[-1])[call.positions].to(value.dtype) for each in tables)
            size = cos.shape[-1]
        elif self.rotated:
            table = call.rotation.transpose(0, 1) if self.sequence_first else call.rotation
            cos, sin = table.to(value.dtype).unbind(-1)
            size = 2 * cos.shape[-1]
        else:
            return heads
        return ops.rotary(query, cos, sin, size, self.rotated), ops.rotary(key, cos, sin, size, self.rotated), value

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """`x` ``[B, Hkv, T, D]`` as the module returns it."""
        return x.permute(["bhld".index(axis) for axis in self.axes])

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values that the module returned as ``[B, Hkv, T, D]``."""
        return x.permute([self.axes.index(axis) for axis in "bhld"])

    def suits(self, call: Call, x: torch.Tensor) -> bool:
        """Whether the convention tells what the module computes for this call."""
        axis = 0 if self.sequence_first else 1
        mask, rotation, positions, past, _ = call
        length = x.shape[axis]
        if (rotation is None) == self.rotated or (
            self.rotated and (rotation.dim(), rotation.shape[axis]) != (4, length)
        ):
            return False
        if self.rotary and (positions is None or positions.dim() != 2):
            return False
        if past is not None and (len(past) != 2 or any(each.dim() != 4 or each.dtype != x.dtype for each in past)):
            return False
        if mask is None:
            return length == 1 or (past is None and self.causal)
        kind = torch.float32 if mask.dtype == x.dtype else mask.dtype
        if kind not in self.masks or mask.dtype not in (torch.bool, x.dtype):
            return False
        return mask.shape[-2] == length or (length == 1 and self.last_row)


class OwnAttention(WatchedForward):
    """Replaces the `forward` of an attention module, with the same arguments and results.

    Keys and values that it returns are views of a native cache, which grows in place while they come back unchanged.
    """

    def __init__(self, module: nn.Module, convention: Convention) -> None:
        super().__init__(module)
        self.convention = convention
        self.read = Reader(module)
        self.project = linear_calls([module._modules[name] for name in convention.inputs])
        self.output = linear_call(module._modules[convention.output])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, call = self.read(args, kwargs)
        if x is None or call is None or not self.convention.suits(call, x) or self.needs_stock(x) or _is_recorded():
            return type(self.module).forward(self.module, *args, **kwargs)
        convention = self.convention
        attended, present = attend(self.module, convention, self.project(x), call)
        result = {"output": self.output(attended), "present": present if call.use_cache else None, None: None}
        return tuple(result[place] for place in convention.result)


def attend(
    module: nn.Module, convention: Convention, projected: list[torch.Tensor], call: Call
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The input of the output projection, and keys and values to return."""
    query, key, value = convention.rotate(module, convention.heads_of(projected), call)
    layer = _layer_of(call.past, convention)
    keys, values = layer.append(key.transpose(1, 2), value.transpose(1, 2))
    mask = call.mask
    if mask is not None:
        mask = mask[..., -query.shape[1] :, :]
        mask = ~mask if mask.dtype == torch.bool else mask
        mask = mask[(None,) * (4 - mask.dim())]
    attended = ops.attention(
        query.transpose(1, 2),
        keys.stored,
        values.stored,
        scale=convention.head_size**-0.5,
        causal=mask is None and convention.causal,
        mask=mask,
    ).flatten(2)
    present = convention.stored(keys.stored), convention.stored(values.stored)
    for each in present:
        setattr(each, _LAYER, layer)
    return attended.transpose(0, 1) if convention.sequence_first else attended, present


def _layer_of(past: Any, convention: Convention) -> NativeLayer:
    """The cache layer that holds `past`, if nothing was appended to it since, else a new one with its tokens."""
    layer = NativeLayer()
    if past is None:
        return layer
    key, value = past
    held = getattr(key, _LAYER, None)
    length = key.shape[convention.axes.index("l")]
    if held is not None and held is getattr(value, _LAYER, None) and held.get_seq_length() == length:
        return held
    layer.append(convention.restored(key), convention.restored(value))
    return layer


def _is_recorded() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class Reader:
    """Reads the arguments of an attention module by their names."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(type(module).forward).parameters
        self.names = list(parameters)[1:]
        self.roles = {name: role for role, names in _NAMES.items() for name in names if name in self.names[1:]}
        self.defaults = {name: parameters[name].default for name in self.roles if parameters[name].default is True}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Call | None]:
        """The hidden states, and the other arguments; None if one has a value that has no role."""
        given = self.defaults | dict(zip(self.names, args, strict=False)) | dict(kwargs)
        x = given.pop(self.names[0], None)
        if len(args) > len(self.names):
            return x, None
        found: dict[str, Any] = {}
        for name, value in given.items():
            if value is None or value is False:
                continue
            if name not in self.roles:
                return x, None
            found[self.roles[name]] = value
        return x, Call(**found)

    def arguments(self, call: Call) -> dict[str, Any]:
        """Keyword arguments for `call`."""
        return {name: getattr(call, role) for name, role in self.roles.items()}


def fuse_attention(model: nn.Module) -> list[str]:
    """Let attention modules of `model` whose code transformers lacks attend natively where trials tell how.

    Returns their names. `restore_forwards` undoes it.
    """
    restore_forwards(model, OwnAttention)
    names = []
    known: dict[type, Convention | None] = {}
    for name, module in own_modules(model).items():
        if not is_own_attention(module) or "forward" in vars(module):
            continue
        kind = type(module)
        first = kind not in known
        convention = convention_of(module, None if first else known[kind]) if first or known[kind] else None
        if first:
            known[kind] = convention
        if convention is not None:
            module.forward = OwnAttention(module, convention)
            names.append(name)
    return names


def is_own_attention(module: nn.Module) -> bool:
    """Whether `module` is named as attention, holds linear layers, and is of a class that transformers lacks."""
    kind = type(module)
    own = kind.__module__.partition(".")[0] not in ("transformers", "torch", "ipex_quant")
    return own and "Attention" in kind.__name__ and len(linear_children(module)) > 1


def convention_of(module: nn.Module, likely: Convention | None = None) -> Convention | None:
    """The convention of an attention module; None where no known one explains what its code returns.

    If one is `likely`, only that is tried, and not with a long past.
    """
    linears = linear_children(module)
    rotary = [name for name, child in module._modules.items() if "rotary" in type(child).__name__.lower()]
    known = linears | {name: module._modules[name] for name in rotary[:1]}
    if len(linears) not in (2, 4) or _has_state(module, known) or others_have_hooks(module, linears):
        return None
    for candidate in [likely] if likely else _candidates(module, linears, "".join(rotary[:1])):
        try:
            with torch.no_grad():
                found = _Trial(module, candidate).explain(long=likely is None)
        except Exception:  # its code does not take these arguments
            continue
        if found is not None:
            return found
    return None


def _has_state(module: nn.Module, known: Mapping[str, nn.Module]) -> bool:
    """Whether `module` has tensors beside those of the modules in it that are `known`, on which results may depend."""
    parts = {id(part) for each in known.values() for part in each.modules()}
    others = [part for part in module.modules() if id(part) not in parts]
    tensors = (
        value
        for part in others
        for value in (*vars(part).values(), *part._parameters.values(), *part._buffers.values())
    )
    return any(isinstance(value, torch.Tensor) for value in tensors)


def _candidates(module: nn.Module, linears: dict[str, nn.Module], rotary: str) -> Iterator[Convention]:
    """Conventions that fit the sizes of the linears; sizes of heads are attributes of the module."""
    sizes = {name: features(linear) for name, linear in linears.items()}
    numbers = sorted({value for value in vars(module).values() if type(value) is int and value > 1}, reverse=True)
    rotated = "rotation" in Reader(module).roles.values()
    for output in linears:
        rest = [name for name in linears if name != output]
        for head_size in numbers:
            heads, odd = divmod(sizes[output][0], head_size)
            if odd:
                continue
            for inputs in permutations(rest):
                counts = [sizes[name][1] / head_size for name in inputs]
                key_heads = int(counts[1] if len(inputs) == 3 else (counts[0] - heads) / 2)
                expected = [heads + 2 * key_heads] if len(inputs) == 1 else [heads, key_heads, key_heads]
                if counts != expected or key_heads < 1 or heads % key_heads:
                    continue
                for first, axes in ((False, "bhld"), (False, "blhd"), (True, "lbhd")):
                    for grouped in (False, True) if len(inputs) == 1 else (False,):
                        counted = heads, key_heads, head_size
                        yield Convention(inputs, output, *counted, grouped, first, axes, rotated, rotary)


class _Trial:
    """Runs the code of `module` on random numbers, to compare what it returns with a convention."""

    def __init__(self, module: nn.Module, convention: Convention) -> None:
        self.module, self.convention = copy.copy(module), convention
        # such modules keep the tables of the longest sequence
        rotary = {name: copy.deepcopy(module._modules[name]) for name in (convention.rotary,) if name}
        self.module.__dict__ |= {"_modules": module._modules | rotary}
        self.read = Reader(module)
        self.linears = {name: module._modules[name] for name in (*convention.inputs, convention.output)}
        self.generator = torch.Generator().manual_seed(2)

    def explain(self, long: bool) -> Convention | None:
        """The convention with what the trials tell of masks and results; None if they contradict it.

        A `long` past has more tokens than any attribute of the module counts, which might be the length of a window.
        """
        whole = self.run(2, 5, Call(use_cache=True))
        causal = next(
            (each for each in (True, False) if self.agrees(whole, replace(self.convention, causal=each))), None
        )
        if causal is None:
            return None
        places = [self.place(whole, value) for value in whole.result]
        if places.count("output") != 1 or places.count("present") != 1 or "?" in places:
            return None
        found = replace(self.convention, causal=causal, result=tuple(places))
        past = whole.result[places.index("present")]
        steps = [self.run(2, 1, Call(past=past, use_cache=True))]
        if long:
            numbers = [value for value in vars(self.module).values() if type(value) is int and value < _LONGEST]
            steps.append(self.run(1, 1, Call(past=self.past(1, max(numbers) + 1), use_cache=True)))
        if not all(self.agrees(each, found) for each in steps):
            return None
        if "use_cache" in self.read.roles.values():
            without = self.run(2, 3, Call())
            if [self.place(without, value) for value in without.result] != [
                None if place == "present" else place for place in places
            ]:
                return None
        masks = frozenset(dtype for dtype in (torch.bool, torch.float32) if self.takes(dtype, 3, 3, past, found))
        rows = bool(masks) and all(self.takes(dtype, 1, 6, past, found) for dtype in masks)
        return replace(found, masks=masks, last_row=rows)

    def takes(self, dtype: torch.dtype, length: int, rows: int, past: Any, found: Convention) -> bool:
        """Whether a mask of `dtype` and `rows` does for `length` queries after a past of 5 what was `found`."""
        if "mask" not in self.read.roles.values():
            return False
        numbers = torch.randn(2, 1, rows, 5 + length, generator=self.generator)
        mask = numbers if dtype == torch.float32 else numbers > 0.5
        try:
            return self.agrees(self.run(2, length, Call(mask, past=past, use_cache=True)), found)
        except Exception:  # its code takes another kind of mask
            return False

    def past(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random keys and values, as the module returns them; the first values are large, so that they count."""
        shape = batch, self.convention.key_heads, length, self.convention.head_size
        key, value = (torch.randn(shape, generator=self.generator) for _ in range(2))
        value[:, :, :8] *= 1000
        return self.convention.stored(key), self.convention.stored(value)

    def run(self, batch: int, length: int, call: Call) -> _Run:
        """What the module's code makes of random hidden states, and of a random rotation if it takes one."""
        convention = self.convention
        shape = (length, batch) if convention.sequence_first else (batch, length)
        if convention.rotated:
            table = torch.randn(*shape, max(convention.head_size // 4, 1), 2, generator=self.generator)
            call = call._replace(rotation=table)
        if "positions" in self.read.roles.values():
            past = 0 if call.past is None else call.past[0].shape[convention.axes.index("l")]
            call = call._replace(positions=torch.randint(past + length, (batch, length), generator=self.generator))
        probe, stand_ins = with_stand_ins(self.module, self.linears, 1.0)
        x = torch.randn(*shape, stand_ins[convention.inputs[0]].in_features, generator=self.generator)
        result = type(self.module).forward(probe, x, **self.read.arguments(call))
        if not all(len(each.inputs) == 1 for each in stand_ins.values()) or not isinstance(result, tuple):
            raise ValueError("its linears are called several times, or it returns no tuple")
        return _Run(x, call, stand_ins, result)

    def agrees(self, run: _Run, convention: Convention) -> bool:
        """Whether the convention gives what the module's code has computed."""
        stand_ins = run.stand_ins
        projected = [stand_ins[name].results[0] for name in convention.inputs]
        attended, present = attend(self.module, convention, projected, run.call)
        returned = next((each for each in run.result if isinstance(each, tuple)), None)
        return (
            all(same(stand_ins[name].inputs[0], run.x) for name in convention.inputs)
            and same(stand_ins[convention.output].inputs[0], attended, 1e-4)
            and returned is not None
            and len(returned) == 2
            and all(same(each, expected, 1e-4) for each, expected in zip(returned, present, strict=True))
        )

    def place(self, run: _Run, value: Any) -> str | None:
        """What a value in the module's result is; "?" if it is none of what the convention knows."""
        if value is None or value == ():
            return None
        if isinstance(value, torch.Tensor):
            return "output" if same(value, run.stand_ins[self.convention.output].results[0]) else "?"
        return "present" if isinstance(value, tuple) else "?"


class _Run(NamedTuple):
    """One call of the module's code on stand-ins."""

    x: torch.Tensor
    call: Call
    stand_ins: Mapping[str, StandIn]
    result: tuple[Any, ...]
