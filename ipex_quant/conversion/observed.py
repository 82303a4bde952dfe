"""`Observed`: the layers of a prepared model whose activations are quantized, in groups that share an observer."""

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
    """Quantization parameters of one layer.

    `activation` quantizes the input; None is dynamic quantization. The columns of the weight are multiplied by
    `weight_factor`, float32 ``[K]``, if there is one, and then its rows quantized with `weight_scales`, float32
    ``[N]``.
    """

    activation: StaticActivation | None
    weight_scales: torch.Tensor
    weight_factor: torch.Tensor | None = None


@dataclass
class ObservedLayer:
    """A layer whose activation is quantized.

    `parameters` come from a loaded summary, and are used if the observer has no data; `quantized` is False if the
    summary leaves the layer in float.
    """

    name: str
    qconfig: Any
    quantized: bool = True
    parameters: LayerParameters | None = None


class _LastSeen:
    """Weak references to the last input of a group and the last output of its producer; a copy is empty."""

    def __init__(self) -> None:
        self._tensor: Any = lambda: None
        self._members: set[str] = set()
        self._produced: Any = lambda: None

    def produce(self, output: Any) -> None:
        """Note the `output` of the group's producer."""
        self._produced = weakref.ref(output) if isinstance(output, torch.Tensor) else lambda: None

    def is_produced(self, x: torch.Tensor) -> bool:
        """Whether `x` is the producer's last output."""
        return self._produced() is x

    def is_new(self, x: torch.Tensor, member: str) -> bool:
        """Whether to observe `x`: no other layer got it before, or `member` gets it again, maybe with new values."""
        if self._tensor() is x and member not in self._members:
            self._members.add(member)
            return False
        self._tensor, self._members = weakref.ref(x), {member}
        return True

    def __reduce__(self) -> Any:
        return _LastSeen, ()


@dataclass
class ObservedGroup:
    """Layers that consume the same tensor, and the observer of that tensor (None for dynamic quantization).

    `producer` is the norm whose output the tensor is, if nothing else reads that output and the layers read no other.
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
        """Whether a layer of the group can be quantized: by statistics, by a summary, or dynamically."""
        loaded = any(layer.parameters is not None for layer in self.layers)
        return self.observer is None or has_data(self.observer) or loaded

    def reset(self) -> None:
        """Drop statistics and parameters; make a new observer."""
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
        """Forward pre-hook of a layer: the first layer that gets a tensor passes it to the observer."""
        x = input_tensor(args, kwargs)
        if x is None:
            return
        if self.producer is not None and not self._last.is_produced(x):
            self.producer = None  # the layers also read tensors that the example did not show
        if self._last.is_new(x, name):
            with naming(name, "input of the layer"):
                observe(self.observer, x.detach())

    def see_produced(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the producer: note its output."""
        self._last.produce(output)


class Observed:
    """All observed layers of a prepared model, grouped, in the order of their calls."""

    def __init__(self, groups: Iterable[ObservedGroup]) -> None:
        self.groups = list(groups)
        self.summary: dict[str, Any] | None = None  # as loaded; its other entries are written back
        self._handles: list[Any] = []

    @property
    def static_groups(self) -> list[ObservedGroup]:
        """The groups that need calibration."""
        return [group for group in self.groups if group.observer is not None]

    def observers(self) -> dict[str, nn.Module]:
        """The activation observers, by the name of the first layer of their group."""
        return {group.name: group.observer for group in self.static_groups}

    def attach(self, model: nn.Module) -> None:
        """Register hooks on `model` that pass inputs of layers to the groups' observers."""
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
    """The `Observed` that `prepare` attached to `model`; RuntimeError if it is not prepared."""
    found = vars(model).get(ATTRIBUTE)
    if found is None:
        raise RuntimeError(
            f"{type(model).__name__} is not prepared for quantizing activations; call ipex_quant.quantization.prepare "
            "with a static, SmoothQuant or dynamic configuration"
        )
    return found


def make_groups(traced: Sequence[SharedInput], qconfigs: Mapping[str, Any], model: nn.Module) -> list[ObservedGroup]:
    """The layers in `qconfigs` in the groups `traced`, split by configuration; layers that are not traced are alone."""
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
    """ValueError unless `observer` is per-tensor and of an 8-bit dtype."""
    dtype, qscheme = (getattr(observer, name, None) for name in ("dtype", "qscheme"))
    per_tensor = qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if not (hasattr(observer, "min_val") and per_tensor and dtype in (torch.quint8, torch.qint8)):
        raise ValueError(
            f"activation observer {type(observer).__name__}: expected an observer of one range for the tensor, with "
            f"dtype quint8 or qint8, got {qscheme} and {dtype}"
        )
