"""How the modules of a checkpoint are stored: of `ipex_quant.llm.save`, and of GPTQ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ...checkpoints.gptq import GptqFormat
from ...conversion.description import KINDS
from ...llm.saved.hf_quantizer import IpexQuantConfig as SavedConfig
from ...nn import Int8Linear, QuantizedEmbedding, WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear
from ...nn.quantized_module import read_activation
from ...nn.weight_only_linear import read_modes, read_scheme
from ...numerics.quantized_stack import QuantizedStack
from ...numerics.quantized_weight import QuantizedWeight, code_dtype
from ...numerics.saved_weight import SAVED_NAMES, saved_stack, saved_weight
from ...numerics.scheme import WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ...ops.int8 import INT8_PER_CHANNEL
from .options import compute_modes, log_compute_mode
from .packed import Modes
from .weights import Int8Weight, Weight, WoqWeight, joined_rows

Experts = tuple[QuantizedStack, QuantizedStack, tuple[torch.Tensor | None, torch.Tensor | None], Modes]
"""Stacks of gate above up, or up alone, and of down; their float32 biases; and how they are multiplied."""

Rename = Callable[[str], str | None]


class Source(ABC):
    """The quantized modules of a checkpoint, by their names in vLLM's model."""

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether the module `name` is quantized."""

    @abstractmethod
    def places(self, names: tuple[str, ...]) -> dict[str, torch.dtype]:
        """Names and dtypes of the tensors that modules have, those in float among them."""

    @abstractmethod
    def read(self, name: str, tensors: dict[str, torch.Tensor], in_features: int) -> Weight:
        """The weight of a module; ValueError or TypeError for tensors that do not fit."""

    @abstractmethod
    def modes(self, name: str) -> Modes:
        """How the weight-only quantized module `name` is multiplied."""

    @abstractmethod
    def renamed(self, rename: Rename) -> Source:
        """The source with other names of modules; `rename` gives None for those that the model has not."""

    @abstractmethod
    def find_modules(self, model: str, revision: str | None) -> None:
        """Find out which modules are quantized, from the checkpoint's list of tensors if needed."""

    def embedding(self, name: str) -> str | None:
        """The name of the quantized embedding at `name`, which vLLM may leave empty; None for one in float."""
        return None

    def tied(self, name: str) -> tuple[str, ...]:
        """The output layers that share the weight of the embedding `name`."""
        return ()

    def has_experts(self, name: str) -> bool:
        """Whether `name` is a mixture of quantized experts."""
        return False

    @abstractmethod
    def experts(self, name: str, tensors: dict[str, torch.Tensor], shape: tuple[int, int, int]) -> Experts:
        """The weights of the experts `name`, of ``(experts, hidden size, intermediate size)``.

        Raises ValueError or TypeError for tensors that do not fit.
        """


class SavedSource(Source):
    """A directory of `ipex_quant.llm.save`; raises ValueError for an entry that it would not write, or of a kind that
    is none of language models.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        saved = SavedConfig(**{name: value for name, value in config.items() if name != "quant_method"})
        self._entries: dict[str, dict[str, Any]] = saved.modules
        self._tied: list[list[str]] = saved.tied
        kinds = (Int8Linear, QuantizedEmbedding, WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear)
        known = {kind.kind for kind in kinds}
        for name, entry in self._entries.items():
            if entry["kind"] not in known:
                raise ValueError(f"{name}: modules of the kind {entry['kind']} are not supported in vLLM")

    def __repr__(self) -> str:
        return f"{len(self._entries)} modules"

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def find_modules(self, model: str, revision: str | None) -> None:
        """Do nothing: the configuration names them."""

    def renamed(self, rename: Rename) -> SavedSource:
        source = object.__new__(SavedSource)
        names = {name: rename(name) for name in self._entries}
        source._entries = {names[name]: entry for name, entry in self._entries.items() if names[name] is not None}
        source._tied = [[names[name] for name in group] for group in self._tied]
        return source

    def places(self, names: tuple[str, ...]) -> dict[str, torch.dtype]:
        found: dict[str, torch.dtype] = {}
        for name in names:
            entry = self._entries.get(name)
            if entry is None:
                found["weight"] = torch.get_default_dtype()
                continue
            found |= dict.fromkeys(KINDS[entry["kind"]].weight_names, torch.float32)
            int8 = entry["kind"] == Int8Linear.kind
            found["codes"] = torch.int8 if int8 else code_dtype(read_scheme(entry).dtype)
            found |= {"input_zero_point": torch.int32} if int8 else {"zero_points": torch.int8, "g_idx": torch.int32}
        return found

    def read(self, name: str, tensors: dict[str, torch.Tensor], in_features: int) -> Weight:
        entry = self._entries.get(name)
        needed = "weight" if entry is None else "codes"
        if needed not in tensors:
            raise ValueError(f"{needed}: missing in the checkpoint")
        if entry is None:
            return tensors["weight"].to(torch.get_default_dtype())
        shape = (len(tensors["codes"]), in_features)
        if entry["kind"] == Int8Linear.kind:
            weight = QuantizedWeight(tensors["codes"], tensors["scales"], None, None, INT8_PER_CHANNEL, shape)
            return Int8Weight(weight, read_activation(tensors))
        return WoqWeight(saved_weight(tensors, read_scheme(entry), shape), self.modes(name))

    def modes(self, name: str) -> Modes:
        entry = self._entries[name]
        if "lowp_mode" not in entry:
            return WoqLowpMode.NONE, WoqActQuantMode.NONE
        return read_modes(entry)

    def embedding(self, name: str) -> str | None:
        names = [each for each, entry in self._entries.items() if entry["kind"] == QuantizedEmbedding.kind]
        if name in names:
            return name
        if name or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"vLLM's model does not tell which of the quantized embeddings it has: {names}")
        return names[0]

    def has_experts(self, name: str) -> bool:
        return self._entries.get(name, {}).get("kind") == WeightOnlyQuantizedExperts.kind

    def experts(self, name: str, tensors: dict[str, torch.Tensor], shape: tuple[int, int, int]) -> Experts:
        entry = self._entries[name]
        count, hidden, width = shape
        blocks = len(tensors["gate_up_codes"][0]) // width
        shapes = {"gate_up": (count, blocks * width, hidden), "down": (count, hidden, width)}
        stacks = []
        for projection, each in shapes.items():
            own = {key: tensors.get(f"{projection}_{key}") for key in SAVED_NAMES}
            stacks.append(saved_stack(own, read_scheme(entry), each))
        biases = tensors.get("gate_up_bias"), tensors.get("down_bias")
        return *stacks, biases, read_modes(entry)

    def tied(self, name: str) -> tuple[str, ...]:
        return tuple(other for group in self._tied if name in group for other in group if other != name)


class GptqSource(Source):
    """A GPTQ checkpoint; raises ValueError for an unsupported layout."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._format = GptqFormat.from_config(config)
        self._names: frozenset[str] = frozenset()
        self._originals: dict[str, str] = {}

    def __repr__(self) -> str:
        return repr(self._format)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def find_modules(self, model: str, revision: str | None) -> None:
        keys = self._format.weight_keys
        tensors = get_safetensors_params_metadata(model, revision=revision)
        modules = (name.rpartition(".") for name in tensors)
        self._names = frozenset(module for module, _, key in modules if key in keys)

    def renamed(self, rename: Rename) -> GptqSource:
        source = object.__new__(GptqSource)
        source._format = self._format
        names = {rename(name): name for name in self._names}
        names.pop(None, None)
        source._names = frozenset(names)
        source._originals = {new: self._originals.get(old, old) for new, old in names.items()}
        return source

    def places(self, names: tuple[str, ...]) -> dict[str, torch.dtype]:
        whole = {} if all(name in self._names for name in names) else {"weight": torch.get_default_dtype()}
        words = dict.fromkeys(("qweight", "qzeros", "g_idx"), torch.int32)
        return whole | words | {"scales": torch.float32}

    def read(self, name: str, tensors: dict[str, torch.Tensor], in_features: int) -> Weight:
        if name not in self._names:
            return tensors["weight"].to(torch.get_default_dtype())
        weight = self._format.read(self._originals.get(name, name), tensors, (None, in_features))
        modes = compute_modes(weight.scheme.dtype.bits)
        log_compute_mode(weight.scheme.dtype.bits, modes[0])
        return WoqWeight(weight, modes)

    def has_experts(self, name: str) -> bool:
        return any(each.startswith(f"{name}.") for each in self._names)

    def experts(self, name: str, tensors: dict[str, torch.Tensor], shape: tuple[int, int, int]) -> Experts:
        count, hidden, width = shape
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for full, tensor in tensors.items():
            module, _, key = full.rpartition(".")
            modules.setdefault(module, {})[key] = tensor
        stacks = []
        for projections, columns in ((("gate_proj", "up_proj"), hidden), (("down_proj",), width)):
            weights = [
                [
                    self._expert(f"{name}.{index}.{each}", modules.get(f"{index}.{each}"), columns)
                    for each in projections
                ]
                for index in range(count)
            ]
            stacks.append(QuantizedStack.of([joined_rows(each) for each in weights]))
        modes = compute_modes(stacks[0].scheme.dtype.bits)
        log_compute_mode(stacks[0].scheme.dtype.bits, modes[0])
        return *stacks, (None, None), modes

    def _expert(self, name: str, tensors: dict[str, torch.Tensor] | None, in_features: int) -> QuantizedWeight:
        if tensors is None:
            raise ValueError(f"{name}: missing in the checkpoint")
        return self._format.read(self._originals.get(name, name), tensors, (None, in_features))

    def modes(self, name: str) -> Modes:
        return compute_modes(self._format.bits or WoqWeightDtype.INT4.bits)
