"""`QuantizedEmbedding`: an embedding that looks rows up in a packed table, which an output layer may share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.saved_weight import saved_places, saved_weight
from .embeddings import PackedEmbedding, RowFactor, ScaledEmbedding, embedding_obstacle, is_embedding, row_factor
from .quantized_module import Placeholder, QuantizedModule, flag
from .weight_only_linear import OPTIONAL_ENTRY, SCHEME_ENTRY, WeightOnlyQuantizedLinear, read_scheme


class QuantizedEmbedding(QuantizedModule, PackedEmbedding):
    """``y = factor * dequantize(weight)[ids]`` with a packed weight ``[num_embeddings, embedding_dim]``.

    `ids` is int64 or int32 of any shape; the result ``[*ids.shape, embedding_dim]`` has the dtype of `weight`, which
    ``.to(dtype)`` changes, and no gradient. An id out of range raises RuntimeError. The packed weight belongs to
    `table`, a weight-only linear layer: the embedding's own or, if tied, the model's output layer; a weight loaded into
    or written to one of the two is then the other's too. The state dict holds the tensors of `saved_weight`.
    """

    kind = "embedding"
    entry_names = frozenset((*SCHEME_ENTRY, "padding_idx", "factor", "rounds_factor"))
    optional_entry_names = OPTIONAL_ENTRY
    weight_names = WeightOnlyQuantizedLinear.weight_names

    def __init__(
        self, table: WeightOnlyQuantizedLinear, padding_idx: int | None = None, factor: RowFactor | None = None
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.factor = RowFactor() if factor is None else factor
        self.num_embeddings, self.embedding_dim = table.weight_shape
        vars(self)["table"] = table  # no child: the output layer is a module of its own
        self.tied = False

    @classmethod
    def from_float(cls, mod: nn.Embedding) -> QuantizedEmbedding:
        """Quantize the embedding `mod` as its attribute `qconfig`, a `QConfigWoq`, says, by rounding to nearest.

        Raises ValueError for an embedding that `embedding_obstacle` refuses, and for NaN or Inf in the weight.
        """
        reason = embedding_obstacle(mod)
        if reason:
            raise ValueError(f"{type(mod).__name__}: {reason}")
        return cls.replacing(mod, ops.quantize_weight(mod.weight, mod.qconfig.scheme, mod.qconfig.scale_dtype))

    @classmethod
    def replacing(cls, mod: nn.Embedding, qw: QuantizedWeight) -> QuantizedEmbedding:
        """Make an embedding with the weight `qw` to replace the float embedding `mod`."""
        table = WeightOnlyQuantizedLinear.from_quantized_weight(qw)
        return cls(table, mod.padding_idx, row_factor(mod)).train(mod.training).to(mod.weight.dtype)

    def share(self, table: WeightOnlyQuantizedLinear) -> None:
        """Use the packed weight of `table` from now on; ValueError when it has another shape."""
        if table.weight_shape != self.weight_shape:
            raise ValueError(f"table: expected shape {list(self.weight_shape)}, got {list(table.weight_shape)}")
        vars(self)["table"] = table
        self.tied = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.table
        rows = ops.woq_embedding(table._packed, ids, self.embedding_dim, table._perm, self._float.dtype)
        return self.factor.apply(rows)

    def dequantize(self) -> nn.Embedding:
        """Return a float embedding with the dequantized `weight`, in its dtype, for inference."""
        weight = self.weight.clone()
        kind = nn.Embedding if self.factor.value == 1 else ScaledEmbedding
        layer = kind(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta", dtype=weight.dtype)
        if kind is ScaledEmbedding:
            layer.factor = self.factor
        layer.load_state_dict({"weight": weight}, assign=True)
        return layer.requires_grad_(False).train(self.training)

    def quantized_weight(self) -> QuantizedWeight:
        """The plain form of the weight, unpacked into new tensors."""
        return self.table.quantized_weight()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight; 0 if the output layer holds it."""
        return 0 if self.tied else self.table.nbytes

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The saved tensors of `quantized_weight` by name."""
        return {name: tensor for name, tensor in self.table.plain_tensors().items() if name in self.weight_names}

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight ``[num_embeddings, embedding_dim]`` in a new tensor, without the factor."""
        return self.table.dequantized_weight(dtype)

    def describe(self) -> dict[str, Any]:
        """Scheme, padding index and row factor."""
        scheme = {
            name: value for name, value in self.table.describe().items() if name in {*SCHEME_ENTRY, *OPTIONAL_ENTRY}
        }
        factor = {"factor": self.factor.value, "rounds_factor": self.factor.rounded}
        return {**scheme, "padding_idx": self.padding_idx, **factor}

    @classmethod
    def placeholder(cls, module: nn.Module, entry: dict[str, Any]) -> Placeholder:
        """Placeholder of the scheme in `entry` for the embedding `module`; ValueError for values that do not fit it."""
        if not is_embedding(module):
            raise ValueError(f"expected an nn.Embedding, got a {type(module).__name__}")
        shape = (module.num_embeddings, module.embedding_dim)
        padding = entry["padding_idx"]
        if padding is not None and (type(padding) is not int or not 0 <= padding < shape[0]):
            raise ValueError(f"padding_idx: expected null or 0..{shape[0] - 1}, got {padding!r}")
        _read_factor(entry)
        return Placeholder(shape, entry, saved_places(read_scheme(entry), shape, flag(entry, "act_order")))

    @classmethod
    def from_placeholders(cls, loaded: Sequence[Placeholder]) -> list[QuantizedEmbedding]:
        """Make one module of each placeholder; ValueError or TypeError for tensors that do not fit the scheme."""
        modules = []
        for place in loaded:
            qw = saved_weight(place.tensors, read_scheme(place.entry), place.shape)
            table = WeightOnlyQuantizedLinear.from_quantized_weight(qw)
            modules.append(cls(table, place.entry["padding_idx"], _read_factor(place.entry)))
        return modules

    def extra_repr(self) -> str:
        fields = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, **self.describe()}
        return ", ".join(f"{name}={value}" for name, value in {**fields, "tied": self.tied}.items())

    def _set_values(self, weight: torch.Tensor) -> None:
        self.table._set_values(weight)

    def _traced_weight(self) -> torch.Tensor:
        table = self.table
        return ops.woq_dequantize(table._packed, table._perm, *self.weight_shape, self._float.dtype)

    def _expected_names(self, given: dict[str, torch.Tensor]) -> list[str]:
        return [name for name in self.table._expected_names(given) if name in self.weight_names]

    def _load_weight(self, tensors: dict[str, torch.Tensor]) -> None:
        self.table._load_weight(tensors)


def _read_factor(entry: dict[str, Any]) -> RowFactor:
    value = entry["factor"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"factor: expected a finite number, got {value!r}")
    return RowFactor(float(value), flag(entry, "rounds_factor"))
