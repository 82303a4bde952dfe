"""Observing a prepared model: the layers whose activations will be quantized, in groups that share an observer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn.linears import is_linear
from ..numerics.int8 import StaticActivation
from ..observers import SmoothQuantActivationObserver, has_data, observe
from ..smoothquant.tracing import SharedInput, input_tensor
from .errors import naming
from .qconfig import QuantizationKind, kind_of

ATTRIBUTE = "_ipex_quant_observed"


@dataclass
class LayerParameters:
    """How one layer is quantized: its input, None where it is quantized as it comes, and its weight.

    The columns of the weight are multiplied by `weight_factor`, float32 ``[K]``, if there is one, and its rows then
    have the `weight_scales`, float32 ``[N]``.
    """

    activation: StaticActivation | None
    weight_scales: torch.Tensor
    weight_factor: torch.Tensor | None = None


@dataclass
class ObservedLayer:
    """One layer whose activation is quantized. `parameters` are those of a loaded summary; data come first.

    A summary may leave it in float, `quantized` False.
    """

    name: str
    qconfig: Any
    quantized: bool = True
    parameters: LayerParameters | None = None


class _LastSeen:
    """The last tensor of a group and the members that met it; it is not kept alive, and a copy has seen nothing."""

    def __init__(self) -> None:
        self._tensor: Any = lambda: None
        self._members: set[str] = set()
        self._produced: Any = lambda: None

    def produce(self, output: Any) -> None:
        """Note what the producer of the group made."""
        self._produced = weakref.ref(output) if isinstance(output, torch.Tensor) else lambda: None

    def is_produced(self, x: torch.Tensor) -> bool:
        """Whether `x` is the last that the producer made."""
        return self._produced() is x

    def is_new(self, x: torch.Tensor, member: str) -> bool:
        """Whether no other member has met `x`; for a member that has, `x` may hold other values by now."""
        if self._tensor() is x and member not in self._members:
            self._members.add(member)
            return False
        self._tensor, self._members = weakref.ref(x), {member}
        return True

    def __reduce__(self) -> Any:
        return _LastSeen, ()


@dataclass
class ObservedGroup:
    """Layers that consume the same tensor, and the observer of that tensor; None where quantization is dynamic.

    `producer` is the norm whose output that tensor is, when nothing else reads it, and as long as they read no other.
    """

    layers: list[ObservedLayer]
    kind: QuantizationKind
    producer: str | None = None
    observer: Any = field(init=False)
    _last: _LastSeen = field(default_factory=_LastSeen, init=False)

    def __post_init__(self) -> None:
        self.reset()

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def has_data(self) -> bool:
        """Whether there is what it takes to quantize one of them: statistics, or parameters of a summary."""
        loaded = any(layer.parameters is not None for layer in self.layers)
        return self.observer is None or has_data(self.observer) or loaded

    def reset(self) -> None:
        """Forget statistics and parameters."""
        self.observer = None
        if self.kind is not QuantizationKind.DYNAMIC:
            self.observer = self.layers[0].qconfig.activation()
            if isinstance(self.observer, SmoothQuantActivationObserver):
                self.observer.smooth_quant_enabled = self.kind is QuantizationKind.SMOOTH_QUANT
            if self.kind is QuantizationKind.STATIC:
                with naming(self.name):
                    _check_plain(getattr(self.observer, "act_obs", self.observer))
        for layer in self.layers:
            layer.parameters = None

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the forward of a member: the first one that meets a tensor shows it to the observer."""
        x = input_tensor(args, kwargs)
        if x is None:
            return
        if self.producer is not None and not self._last.is_produced(x):
            self.producer = None  # the example did not show all that the layers read
        if self._last.is_new(x, name):
            with naming(name, "input of the layer"):
                observe(self.observer, x.detach())

    def see_produced(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after the forward of the producer."""
        self._last.produce(output)


class Observed:
    """All observed layers of a prepared model, grouped, in the order of their calls."""

    def __init__(self, groups: Iterable[ObservedGroup]) -> None:
        self.groups = list(groups)
        self.summary: dict[str, Any] | None = None  # as loaded, for what is in it beside our layers
        self._handles: list[Any] = []

    @property
    def static_groups(self) -> list[ObservedGroup]:
        """The groups that need calibration."""
        return [group for group in self.groups if group.observer is not None]

    def observers(self) -> dict[str, nn.Module]:
        """The activation observers by name: that of the first layer of their group."""
        return {group.name: group.observer for group in self.static_groups}

    def attach(self, model: nn.Module) -> None:
        """Let the groups see what their layers in `model` are called with."""
        for group in self.static_groups:
            for layer in group.layers:
                hook = partial(group.see, layer.name)
                handle = model.get_submodule(layer.name).register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)
            if group.producer is not None:
                producer = model.get_submodule(group.producer)
                self._handles.append(producer.register_forward_hook(group.see_produced))
        setattr(model, ATTRIBUTE, self)

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(model, ATTRIBUTE)


def observed(model: nn.Module) -> Observed:
    """What `prepare` attached to `model`; RuntimeError when it did not."""
    found = vars(model).get(ATTRIBUTE)
    if found is None:
        raise RuntimeError(
            f"{type(model).__name__} is not prepared for quantizing activations; call ipex_quant.quantization.prepare "
            "with a static, SmoothQuant or dynamic configuration"
        )
    return found


def make_groups(traced: Sequence[SharedInput], qconfigs: Mapping[str, Any], model: nn.Module) -> list[ObservedGroup]:
    """Groups of the layers in `qconfigs`: as `traced`, but each of one configuration; untraced layers are alone."""
    groups = []
    seen = {name for share in traced for name in share.members}
    for share in (*traced, *(SharedInput((name,)) for name in qconfigs if name not in seen)):
        split: list[list[str]] = []
        for name in share.members:
            same = next((names for names in split if _same(qconfigs[names[0]], qconfigs[name])), None)
            same.append(name) if same else split.append([name])
        for names in split:
            qconfig = qconfigs[names[0]]
            kind = kind_of(qconfig)
            if kind is QuantizationKind.SMOOTH_QUANT and not is_linear(model.get_submodule(names[0])):
                kind = QuantizationKind.STATIC
            layers = [ObservedLayer(name, qconfigs[name]) for name in names]
            groups.append(ObservedGroup(layers, kind, share.producer if len(split) == 1 else None))
    return groups


def _same(one: Any, other: Any) -> bool:
    return one is other or (kind_of(one) is kind_of(other) is QuantizationKind.DYNAMIC)


def _check_plain(observer: Any) -> None:
    """ValueError unless `observer` finds one range for the whole activation, to quantize it in 8 bits."""
    dtype, qscheme = (getattr(observer, name, None) for name in ("dtype", "qscheme"))
    per_tensor = qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if not (hasattr(observer, "min_val") and per_tensor and dtype in (torch.quint8, torch.qint8)):
        raise ValueError(
            f"activation observer {type(observer).__name__}: expected an observer of one range for the tensor, with "
            f"dtype quint8 or qint8, got {qscheme} and {dtype}"
        )
