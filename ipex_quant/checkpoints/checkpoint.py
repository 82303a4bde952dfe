"""`Checkpoint`: the quantized weights in a state dict, whatever the format they are stored in."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..numerics.quantized_weight import QuantizedWeight
from .file_tensors import Stored
from .files import open_tensors, read_quantization_config
from .format import CheckpointFormat, Int8Input
from .gguf import GgufFormat, gguf_tensors
from .gguf_file import GgufFile
from .gptq import GptqFormat
from .ipex_default import IpexDefaultFormat
from .registry import format_from_config
from .tensors import require


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, tuple[QuantizedWeight, torch.Tensor | None]]):
    """A mapping of module names to ``(weight, bias or None)``, each read from the state dict `tensors` when accessed.

    Weights have the shapes that the file tells.
    """

    tensors: Mapping[str, Stored]
    format: CheckpointFormat
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Names of renamed modules in the file, which the configuration's rules match."""

    @property
    def halves(self) -> bool:
        """Whether `gate_proj` and `up_proj` of an expert are the halves of its parameter, whose rows may alternate."""
        return self.format.halves

    def quantized_weight(
        self, module_name: str, in_features: int | None = None, out_features: int | None = None
    ) -> tuple[QuantizedWeight, torch.Tensor | None] | None:
        """Weight and bias of one module, or None when the checkpoint has no quantized weight for it.

        The bias is ``[out_features]`` in the file's dtype, None when the file has none. Raises ValueError or TypeError,
        with the module named, for tensors that are missing, truncated or do not fit `in_features` and `out_features`.
        """
        if not self.holds(module_name):
            return None
        parts = self._parts(module_name)
        with _naming(module_name):
            weight = self.format.read(self._stored_name(module_name), parts, (out_features, in_features))
            return weight, self._bias(module_name, weight.shape[0])

    def int8_input(self, module_name: str) -> Int8Input | None:
        """How a module quantizes its input to 8 bits, or None if it does not; raises as `quantized_weight` does."""
        with _naming(module_name):
            return self.format.int8_input(self._stored_name(module_name), self._parts(module_name))

    def input_factor(self, module_name: str, in_features: int) -> torch.Tensor | None:
        """Factors ``[in_features]`` of a module's input, or None; ValueError for those of another shape."""
        stored = self.tensors.get(f"{module_name}.{self.format.factor_key}")
        if not self.format.factor_key or stored is None:
            return None
        factor = stored[...]
        if tuple(factor.shape) != (in_features,) or not factor.is_floating_point() or not factor.isfinite().all():
            raise ValueError(
                f"{module_name}.{self.format.factor_key}: expected {in_features} finite floats, got {factor.dtype} "
                f"{list(factor.shape)}"
            )
        return factor

    def holds(self, module_name: str) -> bool:
        """Whether any tensor of the format, other than a float weight, is stored for a module, complete or not."""
        return bool(self._names.get(module_name, {}).keys() - {"weight"})

    def nbytes(self, module_name: str) -> int:
        """Bytes in the file of the quantized weight of a module, or of all modules in it."""
        start = f"{module_name}."
        own = (names for name, names in self._names.items() if name == module_name or name.startswith(start))
        stored = [self.tensors[name] for names in own for name in names.values()]
        return sum(each.shape.numel() * each.dtype.itemsize for each in stored)

    def check_complete(self) -> None:
        """Raise ValueError, with the module and the tensor named, for a quantized module without its weight."""
        for module_name, names in self._modules.items():
            if any(key in names for key in self.format.weight_keys):
                continue
            try:
                require(names, self.format.weight_keys[:1])
            except ValueError as error:
                raise ValueError(f"{module_name}.{error}; get a complete checkpoint") from error

    def other_tensors(self) -> dict[str, Stored]:
        """Every tensor that is no part of a quantized module: embeddings, norms, linears left in float."""
        taken = {name for names in self._modules.values() for name in names.values()}
        taken |= {f"{module}.{self.format.bias_key}" for module in self._modules}
        unused = self.format.unused
        return {name: t for name, t in self.tensors.items() if name not in taken and not name.endswith(unused)}

    def __getitem__(self, module_name: str) -> tuple[QuantizedWeight, torch.Tensor | None]:
        found = self.quantized_weight(module_name)
        if found is None:
            raise KeyError(module_name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @cached_property
    def _modules(self) -> dict[str, dict[str, str]]:
        """`_names` of the quantized modules."""
        return {module: names for module, names in self._names.items() if self.format.quantizes(names.keys())}

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        """Names of the tensors of each module, by their keys in the format."""
        found: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            module, key = split_name(name, self.format.keys)
            if key:
                found.setdefault(module, {})[key] = name
        return found

    def _parts(self, module_name: str) -> dict[str, torch.Tensor]:
        names = self._names.get(module_name, {})
        return {key: self.tensors[name][...] for key, name in names.items() if name in self.tensors}

    def _stored_name(self, module_name: str) -> str:
        return self.stored_names.get(module_name, module_name)

    def _bias(self, module_name: str, out_features: int) -> torch.Tensor | None:
        key = self.format.bias_key
        stored = self.tensors.get(f"{module_name}.{key}")
        bias = None if stored is None else stored[...]
        if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
            raise ValueError(f"{key}: expected floats of shape {[out_features]}, got {bias.dtype} {list(bias.shape)}")
        return bias


def split_name(name: str, keys: Collection[str]) -> tuple[str, str]:
    """Module and key of a tensor's `name`: the longest of `keys`, which may have dots, that ends it; else key ""."""
    for dots in range(max(key.count(".") for key in keys), -1, -1):
        module, *parts = name.rsplit(".", dots + 1)
        if len(parts) > dots and ".".join(parts) in keys:
            return module, ".".join(parts)
    return name, ""


@contextmanager
def _naming(module_name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{module_name}.{error}") from error


@dataclass(frozen=True, eq=False)
class WeightsInMemory(Mapping[str, tuple[QuantizedWeight, torch.Tensor | None]]):
    """Quantized weights by module name, with the interface of a `Checkpoint` without biases and other tensors."""

    weights: Mapping[str, QuantizedWeight]
    tensors: Mapping[str, Stored] = field(default_factory=dict, init=False)
    halves: bool = field(default=False, init=False)

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

    def int8_input(self, module_name: str) -> None:
        """None: no module quantizes its input."""

    def input_factor(self, module_name: str, in_features: int) -> None:
        """None: no module's input has factors."""

    def nbytes(self, module_name: str) -> int:
        """Bytes of the weights of a module, or of all modules in it."""
        start = f"{module_name}."
        return sum(each.nbytes for name, each in self.weights.items() if name == module_name or name.startswith(start))

    def holds(self, module_name: str) -> bool:
        """Whether there is a weight for a module."""
        return module_name in self.weights

    def other_tensors(self) -> dict[str, Stored]:
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
        raise ArgumentTypeError(
            "low_precision_checkpoint should be a state_dict or a tuple (state_dict, config), "
            f"got {type(low_precision_checkpoint).__name__}"
        )
    if len(low_precision_checkpoint) != 2:
        raise ArgumentError(
            "Invalid low_precision_checkpoint: a tuple should be (state_dict, config), "
            f"got {len(low_precision_checkpoint)} elements"
        )
    state_dict, config = low_precision_checkpoint
    state_dict = _state_dict(state_dict)
    if not isinstance(config, Mapping):
        raise ArgumentTypeError(f"checkpoint config: should be a dict, got {type(config).__name__}")
    by_method = "quant_method" in config
    form = format_from_config(config) if by_method else IpexDefaultFormat.from_config(config)
    return _checked(_presented(state_dict, form))


def open_directory(directory: Path) -> Checkpoint:
    """The checkpoint in a directory; tensors of safetensors files are read when they are needed.

    Raises ValueError as `read_quantization_config`, `open_tensors` and `open_checkpoint` do.
    """
    form = format_from_config(read_quantization_config(directory))
    return _checked(_presented(open_tensors(directory), form))


def open_gguf_checkpoint(file: GgufFile) -> Checkpoint:
    """The checkpoint in a GGUF file, with the names of a transformers model; raises as `gguf_tensors` does.

    It has no quantized weights if the file holds floats.
    """
    return Checkpoint(gguf_tensors(file), GgufFormat())


def _presented(tensors: Mapping[str, Stored], form: CheckpointFormat) -> Checkpoint:
    return Checkpoint(form.presented(tensors), form)


def _in_memory(values: Mapping[str, object]) -> WeightsInMemory:
    weights = {}
    for name, weight in values.items():
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"{name}: expected a QuantizedWeight as the others are, got {type(weight).__name__}")
        weights[name] = weight
    return WeightsInMemory(weights)


def _state_dict(state_dict: object) -> Mapping[str, torch.Tensor]:
    if not isinstance(state_dict, Mapping):
        raise ArgumentTypeError(f"low_precision_checkpoint should be a state_dict, got {type(state_dict).__name__}")
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
    if len(checkpoint) == 0 and not checkpoint.format.may_be_float:
        raise ArgumentError(
            f"low_precision_checkpoint: no tensor is named '<module>.{checkpoint.format.weight_keys[0]}': the format "
            f"and the config do not match, or it is not quantized; the first names are {sorted(checkpoint.tensors)[:5]}"
        )
    checkpoint.check_complete()
    return checkpoint
