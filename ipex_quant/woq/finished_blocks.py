"""`FinishedBlocks`: quantized blocks in files, so that an interrupted run can go on after them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..nn.linears import linear_shape
from ..numerics.digest import tensor_digest
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from ..reading import shown
from ..writing import write_whole

_IDENTITY = "identity"


class FinishedBlocks:
    """The weights of finished blocks, each in a file ``<name of the block>.safetensors`` of a directory.

    A file is valid for the settings, samples, schemes and float weights that it was made with, of its block and of all
    blocks before. It is written as a whole. Raises OSError for a directory that cannot be made.
    """

    def __init__(self, directory: Path, settings: object, batches: Sequence[Mapping[str, Any]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        named = ((f"{index}.{name}", value) for index, batch in enumerate(batches) for name, value in batch.items())
        self._identity = _digest(repr(settings), tensor_digest(named))
        self._file = directory

    def load(
        self, name: str, block: nn.Module, schemes: Mapping[str, WeightScheme]
    ) -> dict[str, QuantizedWeight] | None:
        """The weights of the next block in the model's order, by their names in `block`; None if it is not finished.

        Raises ValueError for a file of another run or a damaged one.
        """
        described = sorted((each, repr(scheme)) for each, scheme in schemes.items())
        self._identity = _digest(self._identity, name, repr(described), tensor_digest(block.named_parameters()))
        self._file = self.directory / f"{name}.safetensors"
        if not self._file.exists():
            return None
        try:
            with safe_open(self._file, "pt") as file:
                identity = (file.metadata() or {}).get(_IDENTITY)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        except SafetensorError as error:
            raise ValueError(f"work_dir: {self._file} is damaged: {error}; delete it") from error
        if identity != self._identity:
            raise ValueError(
                f"work_dir: {self._file} is of another model, other data or settings; delete it, or give another "
                "directory"
            )
        return self._weights(tensors, block, schemes)

    def save(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Keep the `weights` of the block that `load` was last called for."""
        tensors = {
            f"{name}.{key}": tensor.contiguous()
            for name, weight in weights.items()
            for key, tensor in weight.tensors().items()
        }
        write_whole(self._file, save(tensors, {_IDENTITY: self._identity}))

    def _weights(
        self, tensors: Mapping[str, torch.Tensor], block: nn.Module, schemes: Mapping[str, WeightScheme]
    ) -> dict[str, QuantizedWeight]:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        try:
            return {
                name: QuantizedWeight(
                    **{part: own.pop(part, None) for part in ("codes", "scales", "zero_points", "g_idx")},
                    **own,
                    scheme=schemes[name],
                    shape=linear_shape(block.get_submodule(name)),
                )
                for name, own in parts.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"work_dir: {self._file} is damaged: {shown(str(error))}; delete it") from error


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
