"""`CheckpointWriter`: what a format stores for the quantized layers of a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import WoqWeightDtype
from ..format import Int8Input

H = TypeVar("H", bound=Hashable)

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


class LayerError(ValueError):
    """A layer that a format cannot hold; its message names the layer, the reason and what to do."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer, of a model or of one of its experts, as a file will have it.

    `read` unpacks its weight, so that only one is in memory at a time; `int8_input` says how the layer quantizes its
    input to 8 bits, or is None if it does not.
    """

    name: str
    read: Callable[[], QuantizedWeight]
    int8_input: Int8Input | None = None


class CheckpointWriter(ABC):
    """Writes the quantized `layers` of a model in one format, beside layers that stay in float.

    `float_layers` are names of the linear layers that stay in float, `head` that of the output layer, or None. The
    constructor reads every weight once, and raises LayerError for the first layer that the format cannot hold.
    """

    def __init__(self, layers: Sequence[Layer], float_layers: Sequence[str], head: str | None) -> None:
        self.layers = layers
        self.float_layers = float_layers
        self.head = head

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The `quantization_config` of the checkpoint, as JSON values."""

    @abstractmethod
    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """The tensors of one layer by their names after the layer's."""


def check_dtype(layer: Layer, weight: QuantizedWeight, held: Iterable[WoqWeightDtype], advice: str) -> None:
    """Raise LayerError unless the format holds weights of this dtype."""
    held = tuple(held)
    if weight.scheme.dtype not in held:
        *first, last = (dtype.name for dtype in held)
        names = f"{', '.join(first)} and {last}" if first else last
        raise LayerError(layer.name, f"its weight is {weight.scheme.dtype.name}, the format holds {names}; {advice}")


def check_one_level(layer: Layer, weight: QuantizedWeight, advice: str) -> None:
    """Raise LayerError for float minimums and two-level scales, which only GGUF has beside this package's own form."""
    reason = None
    if weight.minimums is not None:
        reason = "its groups have float minimums, the format has zero points that are integers"
    elif weight.super_scales is not None:
        reason = "its scales are integers or float8 numbers times super scales, the format has one float for each group"
    if reason is not None:
        raise LayerError(layer.name, f"{reason}; {advice}")


def most_common(values: Iterable[H]) -> H:
    """The value that occurs most often, of several the first; ValueError if there is none."""
    counts = Counter(values)
    return max(counts, key=counts.__getitem__)


def name_patterns(chosen: Collection[str], names: Iterable[str]) -> list[str]:
    """Regular expressions that match the names `chosen` from their start to their end, and none of the other `names`.

    Names that differ only in numbers, of layers and experts, share an expression where no other name has its form.
    """
    own = set(chosen)
    foreign = {_form(name) for name in names if name not in own}
    by_form: Mapping[str, list[str]] = defaultdict(list)
    for name in chosen:
        by_form[_form(name)].append(name)
    found = []
    for form, alike in by_form.items():
        if len(alike) == 1 or form in foreign:
            found += [f"^{re.escape(name)}$" for name in alike]
        else:
            found.append("^" + r"\d+".join(re.escape(part) for part in form.split("\0")) + "$")
    return found


def _form(name: str) -> str:
    return _INDEX.sub("\0", name)
