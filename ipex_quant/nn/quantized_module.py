"""`QuantizedModule`, the base of modules with a packed weight, and `Placeholder`, into which saved tensors load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..numerics.int8 import StaticActivation
from ..numerics.scheme import FLOAT_DTYPES
from .dequantized import DequantizedOnRead, refuse
from .processes import share_with_processes


class QuantizedModule(nn.Module):
    """A module that holds its weight packed for the CPU, and saves and loads it as plain tensors.

    The state dict holds the tensors of `plain_tensors`; those in `weight_names` load all together or not at all.
    ``.to(dtype)`` changes only the dtype that `weight` and `bias` report. Raises RuntimeError when moved off the CPU.
    """

    kind: ClassVar[str]
    """Name of the class in saved configurations."""

    entry_names: ClassVar[frozenset[str]]
    """Keys of the dict that `describe` returns."""

    optional_entry_names: ClassVar[frozenset[str]] = frozenset()
    """Keys that the dict may have beside them."""

    weight_names: ClassVar[tuple[str, ...]]

    _float: torch.Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        share_with_processes(cls)

    def __init__(self) -> None:
        super().__init__()
        # Remembers the dtype that `.to(dtype)` asked for, which only `weight` and `bias` report.
        self.register_buffer("_float", torch.empty(0), persistent=False)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that the module holds: weight, bias and quantization parameters of its input."""
        raise NotImplementedError

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the state dict, by name; empty without a weight."""
        raise NotImplementedError

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The real values of the weight, in a new tensor; RuntimeError when there is none."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The module's entry in a saved configuration, as JSON values, which `placeholder` reads."""
        raise NotImplementedError

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder for what `entry` describes, to replace the float `module`; ValueError when they do not fit."""
        raise NotImplementedError

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[QuantizedModule]:
        """Make modules of the loaded tensors, as one share group if supported; ValueError or TypeError on a misfit."""
        raise NotImplementedError

    def process_state(self) -> dict[str, Any]:
        """State for another process of this machine, which shares the memory of the packed weight."""
        return self.__dict__

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a float tensor that is only dequantized when its values are read.

        Model code asks layers for ``weight.dtype``, ``.shape`` and ``.device``; these cost nothing. Linear layers and
        embeddings quantize values that are written to the whole tensor, in place or as its ``data``, by rounding to
        nearest in their scheme. Writing to a part of it, or to the weight of other modules, raises RuntimeError.
        """
        if torch.compiler.is_compiling():  # cannot trace the stand-in, but drops values that nothing reads
            return self._traced_weight()
        return DequantizedOnRead(self)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``[out_features]`` in the dtype of `weight`, or None."""
        bias = self._float_bias()
        return None if bias is None else bias.to(self._float.dtype)

    @property
    def float_bias(self) -> torch.Tensor | None:
        """The bias ``[out_features]`` in float32, as it is added, or None."""
        return self._float_bias()

    def _traced_weight(self) -> torch.Tensor:
        return self.dequantized_weight(self._float.dtype)

    def _set_values(self, weight: torch.Tensor) -> None:
        """Quantize and hold float32 values of `weight_shape`; RuntimeError for modules that cannot."""
        refuse()

    def _float_bias(self) -> torch.Tensor | None:
        return None  # experts have biases of their own names; torch.jit.trace asks every module for every attribute

    def _expected_names(self, given: dict[str, torch.Tensor]) -> list[str]:
        """Names of the tensors that the module needs, when `given` are offered."""
        return list(self.plain_tensors())

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _set_bias(self, bias: torch.Tensor) -> None:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedModule:
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            raise RuntimeError(f"{type(self).__name__} is packed for the CPU, it cannot be moved to {device}")
        before = {name: buffer for name, buffer in self._buffers.items() if name != "_float"}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer  # the ops take it in float32, whatever the dtype of the activations
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.plain_tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {prefix + name: name for name in (*self.weight_names, "bias")}
        own = {names[key]: value for key, value in state_dict.items() if key in names}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        expected = self._expected_names(own)
        missing = [name for name in expected if name not in own]
        unexpected = [name for name in own if name not in expected]
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected]
        weight_names = [name for name in self.weight_names if name in own]
        if weight_names and set(self.weight_names).isdisjoint(missing + unexpected):
            self._load(prefix, self._load_weight, own, error_msgs)
        elif weight_names:  # an error without `strict` too, which torch does not pass on
            error_msgs.append(f"{prefix}codes: a weight loads whole or not at all, got {weight_names} of {expected}")
        if "bias" in own and "bias" in expected:
            self._load(prefix, self._set_bias, own["bias"], error_msgs)

    @staticmethod
    def _load(prefix: str, load: Any, value: Any, error_msgs: list[str]) -> None:
        try:
            load(value)
        except (TypeError, ValueError) as error:
            error_msgs.append(prefix + str(error))


class Placeholder(nn.Module):
    """Receives the plain tensors of one quantized module from transformers, before the module is made.

    `tensors` gives dtype and shape of each, or None for one that the module does not have; what is loaded may have a
    narrower dtype, which the module reads. `entry` is the module's entry in a saved configuration, `shape` the shape of
    its weight. All other attributes are those of the float module that is replaced: initializers of its parents read
    them, and write to its weight and bias without effect.
    """

    float_module: nn.Module | None = None
    lender: Placeholder | None = None

    def __init__(
        self,
        shape: tuple[int, ...],
        entry: dict[str, Any],
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]] | None],
    ) -> None:
        super().__init__()
        self.entry = entry
        self.shape = tuple(shape)
        for name, kind in tensors.items():
            if kind is not None:
                self.register_buffer(name, torch.empty(kind[1], dtype=kind[0], device="meta"))
        self._names = tuple(tensors)

    def stand_for(self, module: nn.Module) -> None:
        """Offer the attributes of the float `module`, which has no memory while transformers loads a model."""
        vars(self)["float_module"] = module  # not as a child, whose tensors would be looked for

    def borrow(self, names: Sequence[str], lender: Placeholder) -> None:
        """Take the tensors `names` from `lender`, which has the same weight, instead of loading them."""
        for name in names:
            self._buffers.pop(name, None)
        vars(self)["lender"] = lender

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.float_module is None:
                raise
            return getattr(self.float_module, name)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that transformers did not find, or not in the right shape."""
        return [name for name, tensor in self.named_buffers() if not getattr(tensor, "_is_hf_initialized", False)]

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors by name, None for one that the module does not have."""
        lent = {} if self.lender is None else self.lender.tensors
        return {name: self._buffers.get(name, lent.get(name)) for name in self._names}


def autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast `x` to the dtype of torch.autocast where it is on, as torch's own linear layers do."""
    return x.to(autocast_dtype(x))


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of ``autocast(x)``."""
    on = torch.is_autocast_enabled("cpu") and x.dtype in FLOAT_DTYPES
    return torch.get_autocast_dtype("cpu") if on else x.dtype


def check_bias(bias: torch.Tensor, out_features: int) -> torch.Tensor:
    """A float32 copy of `bias`; ValueError unless its shape is ``[out_features]``."""
    if bias.shape != (out_features,):
        raise ValueError(f"bias: expected shape [{out_features}], got {list(bias.shape)}")
    return bias.detach().to(torch.float32, copy=True)


def flag(entry: dict[str, Any], name: str) -> bool:
    """Value `name` of a saved configuration's entry; ValueError when it is no bool."""
    if not isinstance(entry[name], bool):
        raise ValueError(f"{name}: expected true or false, got {entry[name]!r}")
    return entry[name]


def read_activation(tensors: dict[str, torch.Tensor | None]) -> StaticActivation | None:
    """Make a `StaticActivation` of `input_scale`, `input_zero_point` and `smoothing_factor`; None without a scale.

    Raises ValueError or TypeError when they are not float32 ``[1]``, int32 ``[1]`` and float32 ``[K]``.
    """
    scale, zero_point = tensors.get("input_scale"), tensors.get("input_zero_point")
    if scale is None:
        return None
    for name, tensor, dtype in (("input_scale", scale, torch.float32), ("input_zero_point", zero_point, torch.int32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.shape != (1,):
            raise ValueError(f"{name}: expected shape [1], got {list(tensor.shape)}")
    return StaticActivation(scale.item(), zero_point.item(), tensors.get("smoothing_factor"))
