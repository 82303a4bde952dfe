"""`Checkpoint`: the quantized weights in a state dict, whatever the format they are stored in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..numerics.quantized_weight import QuantizedWeight
from .gptq import GptqFormat
from .ipex_default import IpexDefaultFormat
from .registry import CheckpointFormat, format_from_config
from .tensors import require


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, tuple[QuantizedWeight, torch.Tensor | None]]):
    """A mapping of module names to ``(weight, bias or None)``, each read from the state dict `tensors` when accessed.

    Weights have the shapes that the file tells.
    """

    tensors: Mapping[str, torch.Tensor]
    format: CheckpointFormat
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Names of renamed modules in the file, which the configuration's rules match."""

    def quantized_weight(
        self, module_name: str, in_features: int | None = None, out_features: int | None = None
    ) -> tuple[QuantizedWeight, torch.Tensor | None] | None:
        """Weight and bias of one module, or None when the checkpoint has no quantized weight for it.

        The bias is ``[out_features]`` in the file's dtype, None when the file has none. Raises ValueError or TypeError,
        with the module named, for tensors that are missing, truncated or do not fit `in_features` and `out_features`.
        """
        parts = self._parts(module_name)
        if not parts:
            return None
        try:
            stored_name = self.stored_names.get(module_name, module_name)
            weight = self.format.read(stored_name, parts, (out_features, in_features))
            return weight, self._bias(module_name, weight.shape[0])
        except (ValueError, TypeError) as error:
            raise type(error)(f"{module_name}.{error}") from error

    def holds(self, module_name: str) -> bool:
        """Whether any tensor of the format is stored for a module, complete or not."""
        return bool(self._parts(module_name))

    def check_complete(self) -> None:
        """Raise ValueError, with the module and the tensor named, for a quantized module without its weight."""
        for module_name in self:
            try:
                require(self._parts(module_name), self.format.keys[:1])
            except ValueError as error:
                raise ValueError(f"{module_name}.{error}; get a complete checkpoint") from error

    def other_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that is no part of a quantized module: embeddings, norms, linears left in float."""
        own = {*self.format.keys, self.format.bias_key}
        taken = {f"{name}.{key}" for name in self for key in own}
        return {name: tensor for name, tensor in self.tensors.items() if name not in taken}

    def __getitem__(self, module_name: str) -> tuple[QuantizedWeight, torch.Tensor | None]:
        found = self.quantized_weight(module_name)
        if found is None:
            raise KeyError(module_name)
        return found

    def __iter__(self) -> Iterator[str]:
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            for key in self.format.keys:
                if name.endswith(f".{key}"):
                    found.setdefault(name.removesuffix(f".{key}"), []).append(key)
        # A single tensor other than the weight is no quantized module: norms have a `scale` too.
        return (module for module, keys in found.items() if len(keys) > 1 or self.format.keys[0] in keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _find(self, module_name: str, key: str) -> torch.Tensor | None:
        return self.tensors.get(f"{module_name}.{key}")

    def _parts(self, module_name: str) -> dict[str, torch.Tensor]:
        found = {key: self._find(module_name, key) for key in self.format.keys}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def _bias(self, module_name: str, out_features: int) -> torch.Tensor | None:
        key = self.format.bias_key
        bias = self._find(module_name, key)
        if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
            raise ValueError(f"{key}: expected floats of shape {[out_features]}, got {bias.dtype} {list(bias.shape)}")
        return bias


@dataclass(frozen=True, eq=False)
class WeightsInMemory(Mapping[str, tuple[QuantizedWeight, torch.Tensor | None]]):
    """Quantized weights by module name, with the interface of a `Checkpoint` without biases and other tensors."""

    weights: Mapping[str, QuantizedWeight]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, init=False)

    def quantized_weight(
        self, module_name: str, in_features: int | None = None, out_features: int | None = None
    ) -> tuple[QuantizedWeight, None] | None:
        """``(weight, None)`` of one module, or None for a module without a weight; ValueError for another shape."""
        weight = self.weights.get(module_name)
        expected = out_features, in_features
        if weight is None:
            return None
        if any(size not in (None, own) for size, own in zip(expected, weight.shape, strict=True)):
            raise ValueError(f"{module_name}: expected a weight of shape {list(expected)}, got {list(weight.shape)}")
        return weight, None

    def holds(self, module_name: str) -> bool:
        """Whether there is a weight for a module."""
        return module_name in self.weights

    def other_tensors(self) -> dict[str, torch.Tensor]:
        """An empty dict: there are only weights."""
        return {}

    def __getitem__(self, module_name: str) -> tuple[QuantizedWeight, None]:
        return self.weights[module_name], None

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def open_checkpoint(low_precision_checkpoint: object) -> Checkpoint | WeightsInMemory:
    """Return the `Checkpoint` for any argument that `llm.optimize(low_precision_checkpoint=...)` takes:

    - a mapping of module names to `QuantizedWeight`;
    - a state dict, read as `IpexDefaultFormat` if it has its names, else as GPTQ version 1, with a warning;
    - ``(state_dict, config)`` with a `quantization_config`, as `load_low_precision_checkpoint` returns;
    - ``(state_dict, keys)`` with the names of `IpexDefaultFormat`, such as ``{"weight_key": "packed_weight", ...}``.

    Raises TypeError for another type, and ValueError for a tuple, configuration or state dict that is none of these or
    has parts of a module without its weight.
    """
    if isinstance(low_precision_checkpoint, Mapping):
        if any(isinstance(value, QuantizedWeight) for value in low_precision_checkpoint.values()):
            return _in_memory(low_precision_checkpoint)
        state_dict = _state_dict(low_precision_checkpoint)
        return _checked(Checkpoint(state_dict, _format_of(state_dict)))
    if not isinstance(low_precision_checkpoint, (tuple, list)):
        raise TypeError(
            "low_precision_checkpoint should be a state_dict or a tuple (state_dict, config), "
            f"got {type(low_precision_checkpoint).__name__}"
        )
    if len(low_precision_checkpoint) != 2:
        raise ValueError(
            "Invalid low_precision_checkpoint: a tuple should be (state_dict, config), "
            f"got {len(low_precision_checkpoint)} elements"
        )
    state_dict, config = low_precision_checkpoint
    state_dict = _state_dict(state_dict)
    if not isinstance(config, Mapping):
        raise TypeError(f"checkpoint config: should be a dict, got {type(config).__name__}")
    by_method = "quant_method" in config
    form = format_from_config(config) if by_method else IpexDefaultFormat.from_config(config)
    return _checked(Checkpoint(state_dict, form))


def _in_memory(values: Mapping[str, object]) -> WeightsInMemory:
    weights = {}
    for name, weight in values.items():
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"{name}: expected a QuantizedWeight as the others are, got {type(weight).__name__}")
        weights[name] = weight
    return WeightsInMemory(weights)


def _state_dict(state_dict: object) -> Mapping[str, torch.Tensor]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"low_precision_checkpoint should be a state_dict, got {type(state_dict).__name__}")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"state_dict: expected tensors only, got {type(tensor).__name__} for {name!r}")
    return state_dict


def _format_of(state_dict: Mapping[str, torch.Tensor]) -> CheckpointFormat:
    default = IpexDefaultFormat()
    if any(name.endswith(f".{default.weight_key}") for name in state_dict):
        return default
    warnings.warn(
        "low_precision_checkpoint has no config: taking it for GPTQ version 1; give (state_dict, config) to be sure",
        stacklevel=3,
    )
    return GptqFormat()


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    if len(checkpoint) == 0:
        raise ValueError(
            f"low_precision_checkpoint: no tensor is named '<module>.{checkpoint.format.keys[0]}': the format "
            f"and the config do not match, or it is not quantized; the first names are {sorted(checkpoint.tensors)[:5]}"
        )
    checkpoint.check_complete()
    return checkpoint
