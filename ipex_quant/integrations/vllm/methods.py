"""The linear layers, output layers and embeddings of vLLM with weights that a `Reader` reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import StageMissingLayer

from .packed import Modes, PackedWoqLinear
from .weights import (
    Collected,
    Part,
    Reader,
    Weight,
    WoqWeight,
    pack_joined,
    part_indices,
    rank_rows,
    with_columns,
    with_rows,
)

PACKED_NAME = "weight_packed"
"""Parameter that holds the packed weight: one of the names by which LoRA in vLLM finds a layer's weight."""


class ReadLinearMethod(LinearMethodBase):
    """One linear layer of vLLM, made of the modules `names` of a checkpoint, which are its parts in order.

    `places` are the names and dtypes of the tensors that `read` needs.
    """

    def __init__(self, names: tuple[str, ...], places: dict[str, torch.dtype], read: Reader) -> None:
        self.names = names
        self.places = places
        self.read = read

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add places for the tensors of the checkpoint."""
        self._collected = Collected(layer, self.places)
        self._inputs = input_size, input_size_per_partition
        self._own_sizes = tuple(output_partition_sizes)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Read what was loaded, cut this rank's part, and pack it; nothing plain stays."""
        weights = self._weights(layer)
        self._collected.leave(layer)
        self.linear = pack_joined(weights, getattr(layer, "bias", None))
        layer.register_parameter(PACKED_NAME, torch.nn.Parameter(self.linear.data, requires_grad=False))
        self._forward = self.linear.forward

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._forward(x, bias)

    def _weights(self, layer: torch.nn.Module) -> list[Weight]:
        """The weights of this rank, in the order of the layer's parts."""
        count = len(self._own_sizes)
        loaded = {part_indices(key, count): tensors for key, tensors in self._collected.tensors.items()}
        if sorted(index for indices in loaded for index in indices) != list(range(count)):
            raise ValueError(
                f"{', '.join(self.names)}: expected tensors of {count} parts, got those of {sorted(loaded)}"
            )
        return [self._weight(layer, indices, tensors) for indices, tensors in sorted(loaded.items())]

    def _weight(self, layer: torch.nn.Module, indices: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> Weight:
        part = self._part(layer, indices)
        whole, own = self._inputs
        try:
            weight = self.read(part.name, tensors, whole)
            weight = with_rows(weight, self._rows(layer, part))
            return weight if own == whole else with_columns(weight, layer.tp_rank * own, (layer.tp_rank + 1) * own)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{part.name}: {error}") from error

    def _part(self, layer: torch.nn.Module, indices: tuple[int, ...]) -> Part:
        sizes = _checkpoint_sizes(layer, len(self._own_sizes))
        name = self.names[indices[0]] if len(self.names) == len(sizes) else self.names[0]
        return Part(name, tuple(sizes[i] for i in indices), tuple(self._own_sizes[i] for i in indices))

    def _rows(self, layer: torch.nn.Module, part: Part) -> torch.Tensor | slice:
        return rank_rows(part, getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1))


class ReadHeadMethod(ReadLinearMethod):
    """An output layer, whose rows are those of a vocabulary; it may share the weight of a quantized embedding."""

    _embedding: torch.nn.Module | None = None

    def __init__(self, name: str, places: dict[str, torch.dtype], read: Reader, modes: Modes) -> None:
        super().__init__((name,), places, read)
        self.modes = modes

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Share the weight of `embed_tokens` if it has the layer's; else the checkpoint has one for each."""
        method = embed_tokens.quant_method
        if isinstance(method, ReadEmbeddingMethod) and self.names[0] in method.tied:
            self._embedding = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if isinstance(layer, StageMissingLayer):  # in place of the head of a model that embeds
            return
        if self._embedding is None:
            super().process_weights_after_loading(layer)
        else:
            self._collected.leave(layer)
            self.linear = self._embedding.quant_method.table(self._embedding, self.modes)
            self._forward = self.linear.forward
        rows = layer.shard_indices.num_org_elements
        self._missing = layer.num_embeddings_per_partition - rows if layer.tp_size > 1 else 0

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        logits = self._forward(x, bias)
        return F.pad(logits, (0, self._missing)) if self._missing else logits

    def _part(self, layer: torch.nn.Module, indices: tuple[int, ...]) -> Part:
        return Part(self.names[0], (), ())

    def _rows(self, layer: torch.nn.Module, part: Part) -> slice:
        return _vocabulary_rows(layer)


class ReadEmbeddingMethod(QuantizeMethodBase):
    """An embedding with a weight-only quantized table; `tied` are names of output layers that share it."""

    def __init__(self, name: str, places: dict[str, torch.dtype], read: Reader, tied: tuple[str, ...]) -> None:
        self.name = name
        self.places = places
        self.read = read
        self.tied = tied

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        """Add places for the tensors of the checkpoint."""
        self._collected = Collected(layer, self.places)
        self._dtype = params_dtype
        self._table: PackedWoqLinear | None = None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the rows of this rank, if the output layer has not done so."""
        self.table(layer, None)

    def table(self, layer: torch.nn.Module, modes: Modes | None) -> PackedWoqLinear:
        """The packed rows of this rank as a linear layer, made when first asked for."""
        if self._table is None:
            weight = self.read(self.name, self._collected.tensors.get(None, {}), layer.embedding_dim)
            assert isinstance(weight, WoqWeight)
            weight = with_rows(weight, _vocabulary_rows(layer))
            self._table = PackedWoqLinear(weight.weight, None, weight.modes)
            self._collected.leave(layer)
            layer.register_parameter(PACKED_NAME, torch.nn.Parameter(self._table.data, requires_grad=False))
        return self._table if modes is None else self._table.with_modes(modes)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """The rows of `input_`; vLLM's models multiply them by their factors."""
        return self._table.rows(input_, self._dtype)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The logits, for models whose output layer is the embedding itself."""
        return self._table.forward(x, bias)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        return layer


class UntiedHeadMethod(UnquantizedEmbeddingMethod):
    """A float output layer, which has a weight of its own if the embedding is quantized."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        if isinstance(embed_tokens.quant_method, ReadEmbeddingMethod):
            return layer
        return super().tie_weights(layer, embed_tokens)


def _vocabulary_rows(layer: torch.nn.Module) -> slice:
    indices = layer.shard_indices
    return slice(indices.org_vocab_start_index, indices.org_vocab_end_index)


def _checkpoint_sizes(layer: torch.nn.Module, count: int) -> tuple[int, ...]:
    """The output features of each part of a layer in a checkpoint."""
    heads = getattr(layer, "total_num_heads", None)
    if heads is not None:  # `output_sizes` counts the heads of keys and values once for each rank that has them
        keys = layer.total_num_kv_heads
        return heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size
    return tuple(getattr(layer, "output_sizes", [layer.output_size]))
