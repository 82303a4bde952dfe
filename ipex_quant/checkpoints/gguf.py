"""GGUF: the quantized weights of a `GgufFile`, or of safetensors with its blocks.

A quantized tensor is presented as ``<module>.<type>``, such as ``model.layers.0.mlp.up_proj.Q4_K``, uint8 with the
blocks of a row in a row: the key tells what the bytes are. Tensors in float are those of a float checkpoint. GPTQModel
writes ``<module>.qweight``, uint8 ``[N, bytes]``; `bits` and `format`, such as ``q_k_m``, of its configuration name the
type, and `dynamic` may give modules other bits, which the width of their rows tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from ..numerics.affine import feature_groups, plain_codes, stored_codes
from ..numerics.quantized_weight import QuantizedWeight
from ..reading import shown
from .file_tensors import Derived, ExpertRows, Stored
from .format import CheckpointFormat
from .gguf_blocks import BLOCKS, float_rows, read_blocks
from .gguf_file import GgufFile, GgufTensor
from .gguf_names import ARCHITECTURES, IGNORED, Place, architecture_of, layer_of, part_of, place_of
from .tensors import check, check_rank, require

MANY_LAYERS = 1 << 31
"""Layers of a file that does not say how many."""

_WEIGHT = "qweight"
_ORDER = "order"
"""The file's column in place of each of the model's."""

_KEYS_AND_VALUES = ("attn_k", "attn_v", "attn_k_norm")
"""Parts of a layer that one that shares keys and values does not use."""

_FORMAT = re.compile(r"^(?P<family>i?q)(?P<bits>\d?)_(?P<variant>0|1|k|nl|xs)(?:_(?:xs|s|m|l))?$")


@dataclass(frozen=True)
class GgufFormat(CheckpointFormat):
    """How the modules of a GGUF checkpoint are stored; `kind` is the type of most blocks in `qweight`, "" without."""

    kind: str = ""

    keys = (*BLOCKS, _WEIGHT, _ORDER)
    weight_keys = keys[:-1]
    may_be_float = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GgufFormat:
        """The format that a `quantization_config` describes; raises ValueError for a type that is not read."""
        stated, bits = config.get("format") or "", config.get("bits", 4)
        if isinstance(bits, str) and not bits.isdecimal():
            stated = bits  # such as "q4_k_m"
        found = _FORMAT.match(stated.lower().replace("-", "_")) if isinstance(stated, str) else None
        if not stated or stated == "gguf":
            return cls("" if "bits" not in config else f"Q{bits}_0")
        kind = f"{found['family']}{found['bits'] or bits}_{found['variant']}".upper() if found else ""
        if kind not in BLOCKS:
            names = [each.lower() for each in BLOCKS]
            raise ValueError(f"bits, format: expected one of {names}, got {shown(bits)}, {shown(stated)}")
        return cls(kind)

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError or TypeError for blocks that do not fit `shape`."""
        tensors = dict(tensors)
        order = tensors.pop(_ORDER, None)
        key = next(iter(tensors), self.weight_keys[0])
        (stored,) = require(tensors, (key,))
        check_rank(key, stored, 2)
        kind = self._kind(stored.shape[1], shape[1]) if key == _WEIGHT else key
        if len(tensors) != 1 or kind not in BLOCKS:
            raise ValueError(f"{key}: expected blocks of one type that the configuration names, got {sorted(tensors)}")
        blocks = BLOCKS[kind]
        rows, columns = shape
        if columns is not None and columns % blocks.elements:
            raise ValueError(f"{key}: {kind} has blocks of {blocks.elements}, which do not divide {columns} columns")
        width = stored.shape[1] if columns is None else columns // blocks.elements * blocks.size
        check(key, stored, (torch.uint8,), (len(stored) if rows is None else rows, width))
        if not width or width % blocks.size:
            raise ValueError(f"{key}: expected rows of whole blocks of {blocks.size} bytes, got {width}")
        weight = read_blocks(kind, stored)
        return weight if order is None else _in_order(weight, order)

    def _kind(self, width: int, columns: int | None) -> str:
        """`kind`, or the one of its family whose rows of `columns` have `width` bytes."""
        alike = (each for each in BLOCKS if self.kind and each[-2:] == self.kind[-2:] and each[0] == self.kind[0])
        for each in (self.kind, *alike):
            if each in BLOCKS and columns is not None:
                blocks = BLOCKS[each]
                if columns % blocks.elements == 0 and columns // blocks.elements * blocks.size == width:
                    return each
        return self.kind


def gguf_tensors(file: GgufFile) -> dict[str, Stored]:
    """The tensors of `file` under the names of a transformers model, of experts one by one.

    Raises ValueError for an architecture that is not read, and for tensors that it does not have.
    """
    architecture = architecture_of(file)
    if architecture is None:
        raise ValueError(
            f"{file.path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, got "
            f"{shown(file.architecture)}"
        )
    result: dict[str, Stored] = {}
    unknown = []
    layers = file.of_model("block_count", int, MANY_LAYERS)
    layers = max(layers, file.of_model("decoder_block_count", int, layers))
    extra = file.of_model("nextn_predict_layers", int, 0)
    shared = file.of_model("attention.shared_kv_layers", int, 0)
    for name, tensor in file.tensors.items():
        place = place_of(architecture, name)
        if name.endswith(IGNORED):
            continue
        layer = layer_of(name)
        if layer is not None and layers - extra <= layer < layers:
            continue  # what predicts further tokens, which transformers has no place for
        if layer is not None and layer >= layers - shared and part_of(name) in _KEYS_AND_VALUES:
            continue  # of layers that have those of another
        if place is None or (layer or 0) >= layers:
            unknown.append(name)
            continue
        for new, stored in _placed(file, name, tensor, place):
            if new in result:
                raise ValueError(f"{file.path}: {shown(name)} is a second tensor for {new}")
            result[new] = stored
    if unknown:
        raise ValueError(
            f"{file.path}: {len(unknown)} tensors have no place in the architecture {shown(file.architecture)}: "
            f"{shown(unknown[:5])}"
        )
    return result


def _placed(file: GgufFile, name: str, tensor: GgufTensor, place: Place) -> Iterator[tuple[str, Stored]]:
    """Names and tensors in the model that the file's tensor `name` becomes."""
    stacked = "*" in place.module
    stored = tensor.stored
    if stacked and (stored.dim() < 2 or not stored.shape[0]):
        raise ValueError(f"{file.path}: {shown(name)}: expected a stack of experts, got shape {list(stored.shape)}")
    if tensor.kind and stored.dim() != 2 + stacked:
        raise ValueError(f"{file.path}: {shown(name)}: expected {2 + stacked} dimensions, got {list(stored.shape)}")
    quantized = bool(tensor.kind) and place.quantizable
    for expert, (module, rows) in product(range(stored.shape[0] if stacked else 1), _parts(file, name, tensor, place)):
        own: Stored = ExpertRows(stored, expert, rows) if stacked else stored
        if place.rows is not None:
            own = Derived(own, own.shape, own.dtype, partial(_take, place.rows(file, own.shape[0])))
        if tensor.kind and not quantized:
            shape = torch.Size((own.shape[0], _columns(tensor.kind, own)))
            own = Derived(own, shape, torch.float32, partial(float_rows, tensor.kind))
        if place.columns is not None:
            order = place.columns(file, _columns(tensor.kind, own) if quantized else own.shape[1])
            if quantized:
                yield f"{place.module}.{_ORDER}", order.int()
            else:
                own = Derived(own, own.shape, own.dtype, partial(_take_columns, order))
        if place.values is not None and not quantized:
            own = Derived.of_values(own, place.values.read)
        module = module.replace("*", str(expert))
        key = tensor.kind if quantized else place.key
        yield f"{module}.{key}" if module else key, own


def _parts(file: GgufFile, name: str, tensor: GgufTensor, place: Place) -> list[tuple[str, slice]]:
    """The modules that a tensor is of, and their rows in each entry of a stack."""
    names = place.module.split("|")
    if len(names) == 1:
        return [(place.module, slice(None))]
    if tensor.stored.dim() < 2 or tensor.stored.shape[1] % len(names):
        raise ValueError(
            f"{file.path}: {shown(name)}: expected {len(names)} parts of the same rows, got {list(tensor.stored.shape)}"
        )
    owner = names[0].rpartition(".")[0]
    size = tensor.stored.shape[1] // len(names)
    modules = (names[0], *(f"{owner}.{other}" for other in names[1:]))
    return [(module, slice(number * size, (number + 1) * size)) for number, module in enumerate(modules)]


def _columns(kind: str, rows: Stored) -> int:
    """Elements of a row of blocks."""
    return rows.shape[1] // BLOCKS[kind].size * BLOCKS[kind].elements


def _in_order(weight: QuantizedWeight, order: torch.Tensor) -> QuantizedWeight:
    """`weight` with its columns in another order, and the groups that they had."""
    check(_ORDER, order, (torch.int32,), (weight.shape[1],))
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=torch.int32)):
        raise ValueError(f"{_ORDER}: expected each of {len(order)} columns once")
    codes = plain_codes(stored_codes(weight)[:, order.long()], weight.scheme.dtype)
    return replace(weight, codes=codes, g_idx=feature_groups(weight)[order.long()].int())


def _take_columns(order: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, order]


def _take(order: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[order]
