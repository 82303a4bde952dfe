"""The AWQ checkpoint format, in the layout "gemm" of AutoAWQ, which all current tools write.

A linear with weight ``[N, K]`` is stored as

- ``qweight`` int32 ``[K, N / 8]``: the 4-bit codes of feature k, eight outputs to a word; nibble i of word c, from the
  low bits on, is output ``8 * c + ORDER[i]``;
- ``qzeros`` int32 ``[groups, N / 8]``: the zero points, 0..15 as they are, in the same order;
- ``scales`` ``[groups, N]``.

The weight is ``w[n, k] = scales[g, n] * (code[k, n] - zero_point[g, n])`` with ``g = k // group_size``. Source:
AutoAWQ's ``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.nibbles import as_bytes, pack_nibbles
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, WeightScheme, WoqWeightDtype
from ..reading import shown
from .format import CheckpointFormat, made_by_gptqmodel
from .tensors import INDEX_DTYPES, check, check_rank, integer_weight, require, resolve_group_size, shape_or_stored

BITS = 4
FIELDS = 8
"""Outputs in one int32 word."""

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of the eight in a word, that each nibble holds."""

_WEIGHT, _ZEROS, _SCALES, _G_IDX = "qweight", "qzeros", "scales", "g_idx"

_OLD_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}
"""Entries as the first releases of AutoAWQ named them in ``quant_config.json``."""


@dataclass(frozen=True)
class AwqFormat(CheckpointFormat):
    """How the modules of one AWQ checkpoint are stored; a `group_size` of None is inferred from each module's shapes.

    Raises ValueError for a `group_size` that is no integer.
    """

    group_size: int | None = None
    halves: bool = False

    keys = (_WEIGHT, _ZEROS, _SCALES)

    def __post_init__(self) -> None:
        if self.group_size is not None and not isinstance(self.group_size, int):
            raise ValueError(f"group_size: expected an integer, got {shown(self.group_size)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AwqFormat:
        """The format that a `quantization_config` describes; raises ValueError for another layout than "gemm"."""
        layout = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        if not isinstance(layout, str) or layout.lower() != "gemm":
            raise ValueError(f"version: expected 'gemm' for AWQ, got {shown(layout)}; save the checkpoint as 'gemm'")
        bits, group_size = (config.get(name, config.get(old)) for name, old in _OLD_NAMES.items())
        if bits not in (None, BITS):
            raise ValueError(f"bits: expected {BITS} for AWQ, got {shown(bits)}")
        return cls(group_size, made_by_gptqmodel(config))

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module from its `tensors`; raises as `read_awq` does."""
        return read_awq(tensors, self.group_size, shape=shape)


def read_awq(
    tensors: Mapping[str, torch.Tensor],
    group_size: int | None = None,
    *,
    shape: tuple[int | None, int | None] = (None, None),
) -> QuantizedWeight:
    """Read ``qweight``, ``qzeros``, ``scales`` and, if there, an int ``g_idx`` ``[K]`` of one module, as INT4.

    `shape` is the expected ``(out_features, in_features)``; a `group_size` of None is inferred. Raises ValueError for
    missing, truncated or inconsistent tensors, and TypeError for another dtype.
    """
    qweight, qzeros, scales = require(tensors, (_WEIGHT, _ZEROS, _SCALES))
    g_idx = tensors.get(_G_IDX)
    check_rank(_WEIGHT, qweight, 2)
    check_rank(_SCALES, scales, 2)
    groups = scales.shape[0]
    out_features, in_features = shape_or_stored(shape, (scales.shape[1], qweight.shape[0]))
    size = resolve_group_size(group_size, in_features, groups)
    scheme = WeightScheme(WoqWeightDtype.INT4, symmetric=False, group_size=size)

    words = -(-out_features // FIELDS)
    check(_WEIGHT, qweight, (torch.int32,), (in_features, words))
    check(_SCALES, scales, FLOAT_DTYPES, (scheme.group_count(in_features), out_features))
    check(_ZEROS, qzeros, (torch.int32,), (groups, words))
    if g_idx is not None:
        check(_G_IDX, g_idx, INDEX_DTYPES, (in_features,))

    codes, zero_points = (_outputs(packed, out_features) for packed in (qweight, qzeros))
    return integer_weight(
        pack_nibbles(codes.contiguous()), scales.t(), zero_points, g_idx, scheme, (out_features, in_features)
    )


def _outputs(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """Fields by output: int32 ``[M, ceil(N / 8)]`` to uint8 ``[N, M]``."""
    stream, words, count = as_bytes(packed), packed.shape[1], packed.shape[0]
    outputs = stream.new_empty(words, FIELDS, count)
    for half, nibbles in enumerate((stream & 15, stream >> 4)):  # bytes are transposed, which is fast for a matrix
        outputs[:, ORDER[half::2]] = nibbles.t().contiguous().view(words, FIELDS // 2, count)
    return outputs.flatten(0, 1)[:out_features]
