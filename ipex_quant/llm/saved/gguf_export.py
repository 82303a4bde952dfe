"""`write_model`: a model and its tokenizer in one GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from ...checkpoints.gguf_file import GgufFile
from ...checkpoints.gguf_names import ARCHITECTURES, Architecture, Place, name_in_file, place_of
from ...checkpoints.writers import Layer, LayerError
from ...checkpoints.writers.gguf import FILE_TYPES, FLOATS, GgufData, float_data, layer_data, stacked_data, write_gguf
from ...writing import replaced_file
from .export_parts import ExportParts
from .gguf_parts import model_metadata, rope_tensors, written_as
from .gguf_tokenizer import tokenizer_metadata

_MANY_LAYERS = 16
_HEAD = "output.weight"


def write_model(path: Path, config: PreTrainedConfig, parts: ExportParts, tokenizer: Any) -> None:
    """Write the model and its tokenizer to `path`.

    Raises LayerError for a layer that no block holds exactly, ValueError for tensors that the architecture has no place
    for, and for a tokenizer that is not written.
    """
    written = written_as(config)
    metadata = model_metadata(config) | tokenizer_metadata(tokenizer, config.vocab_size)
    places = _Places(ARCHITECTURES[written.name], GgufFile(path, metadata, {}))
    for name, read in parts.others.items():
        module, _, key = name.rpartition(".")
        places.add_floats(module, key, read)
    for layer in parts.embeddings:
        places.add_layer(layer)
    for layer, bias in tqdm(parts.layers, desc="reading", unit="layer", disable=len(parts.layers) < _MANY_LAYERS):
        places.add_layer(layer)
        if bias is not None:
            places.add_floats(layer.name, "bias", partial(torch.Tensor.clone, bias))
    tensors = places.tensors()
    if _HEAD in tensors and not written.own_head:
        raise LayerError(
            parts.head or _HEAD,
            f"llama.cpp has no output layer in {config.model_type} models beside the embedding; quantize neither, or "
            "both as one",
        )
    for name, factors in rope_tensors(config).items():
        tensors[name] = float_data(factors.shape, factors.dtype, partial(torch.Tensor.clone, factors))
    bytes_of: Counter[str] = Counter()
    for data in tensors.values():
        bytes_of[data.kind] += data.nbytes if data.kind not in FLOATS.values() else 0
    metadata["general.file_type"] = FILE_TYPES[max(bytes_of, key=bytes_of.__getitem__)]
    with replaced_file(path) as file:
        write_gguf(file, metadata, tensors)


@dataclass(frozen=True)
class _Places:
    """Tensors by their names in `file`, of which only the metadata are there; those of experts are stacked."""

    architecture: Architecture
    file: GgufFile
    _parts: dict[str, dict[int | None, GgufData]] = field(default_factory=dict, init=False)
    """By name and number of the expert."""

    def add_floats(self, module: str, key: str, read: Callable[[], torch.Tensor]) -> None:
        """Add a float tensor of `module`."""
        name, expert, place = self._find(module, key)
        tensor = read()
        order, values = self._order(place, len(tensor)), place.values

        def make() -> torch.Tensor:
            made = read() if values is None else values.write(read())
            return made if order is None else made[order]

        shape = tensor.shape if values is None else values.write(tensor).shape
        # llama.cpp multiplies by what is never quantized, and adds biases of experts, in float32
        dtype = tensor.dtype if place.quantizable else torch.float32
        self._parts.setdefault(name, {})[expert] = float_data(shape, dtype, make)

    def add_layer(self, layer: Layer) -> None:
        """Add the weight of a quantized layer."""
        name, expert, place = self._find(layer.name, "weight")
        if not place.quantizable:
            raise LayerError(layer.name, "llama.cpp has it in float; leave it in float, or write another format")
        self._parts.setdefault(name, {})[expert] = layer_data(layer, self._order(place, layer.read().shape[0]))

    def tensors(self) -> dict[str, GgufData]:
        """All tensors that were added; LayerError for experts of one layer that differ in their type."""
        result = {}
        for name, parts in self._parts.items():
            if None in parts:
                result[name] = parts[None]
                continue
            try:
                result[name] = stacked_data([parts[expert] for expert in range(len(parts))])
            except (KeyError, ValueError) as error:
                raise LayerError(name, f"GGUF has all experts in one tensor ({error}); write another format") from error
        return result

    def _find(self, module: str, key: str) -> tuple[str, int | None, Place]:
        found = name_in_file(self.architecture, module, key)
        place = None if found is None else place_of(self.architecture, found[0])
        if found is None or place is None:
            raise ValueError(f"{module}: GGUF has no place for it; write another format")
        return *found, place

    def _order(self, place: Place, rows: int) -> torch.Tensor | None:
        """The model's row at each row of the file."""
        return None if place.rows is None else place.rows(self.file, rows).argsort()
