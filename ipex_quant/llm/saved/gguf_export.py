"""`write_model`: a model and its tokenizer in one GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from ...checkpoints.gguf_file import GgufFile
from ...checkpoints.gguf_names import ARCHITECTURES, Architecture, Place, name_in_file, place_of
from ...checkpoints.writers import Layer, LayerError
from ...checkpoints.writers.gguf import FILE_TYPES, FLOATS, GgufData, float_data, layer_data, write_gguf
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
    tensors: dict[str, GgufData] = {}
    for name, read in parts.others.items():
        module, _, key = name.rpartition(".")
        tensors |= places.of_floats(module, key, read)
    for layer in parts.embeddings:
        tensors |= places.of_layer(layer)
    for layer, bias in tqdm(parts.layers, desc="reading", unit="layer", disable=len(parts.layers) < _MANY_LAYERS):
        tensors |= places.of_layer(layer)
        if bias is not None:
            tensors |= places.of_floats(layer.name, "bias", partial(torch.Tensor.clone, bias))
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
    """Names and orders of tensors in `file`, of which only the metadata are there."""

    architecture: Architecture
    file: GgufFile

    def of_floats(self, module: str, key: str, read: Callable[[], torch.Tensor]) -> dict[str, GgufData]:
        """A float tensor by its name in the file."""
        name, place = self._find(module, key)
        tensor = read()
        order, values = self._order(place, len(tensor)), place.values

        def make() -> torch.Tensor:
            made = read() if values is None else values.write(read())
            return made if order is None else made[order]

        shape = tensor.shape if values is None else values.write(tensor).shape
        return {name: float_data(shape, tensor.dtype, make)}

    def of_layer(self, layer: Layer) -> dict[str, GgufData]:
        """The weight of a quantized layer by its name in the file."""
        name, place = self._find(layer.name, "weight")
        return {name: layer_data(layer, self._order(place, layer.read().shape[0]))}

    def _find(self, module: str, key: str) -> tuple[str, Place]:
        name = name_in_file(self.architecture, module, key)
        place = None if name is None else place_of(self.architecture, name)
        if name is None or place is None:
            raise ValueError(f"{module}: GGUF has no place for it; write another format")
        return name, place

    def _order(self, place: Place, rows: int) -> torch.Tensor | None:
        """The model's row at each row of the file."""
        return None if place.rows is None else place.rows(self.file, rows).argsort()
