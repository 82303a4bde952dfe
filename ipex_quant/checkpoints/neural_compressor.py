"""What neural-compressor writes in its layout "huggingface", whose `quant_method` is "gptq" whatever the file holds.

- Round-to-nearest and GPTQ: GPTQ version 1.
- AWQ: the tensors are those of ``<module>.linear``, and `<module>.input_scale` ``[K]`` multiplies the input.
- NF4: `qweight` int32 ``[N, K / 8]``, eight codes a word from the low bits on, and `scales` ``[N, groups]``, without
  `qzeros`. Codes are numbers of two's complement: 7 is the lowest level, 1..6 the next, 0 is 0, -8..-1 the rest.

Source: neural-compressor's ``WeightOnlyLinear`` and its table of NF4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..numerics.nibbles import as_bytes, pack_nibbles, unpack_nibbles
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, WeightScheme, WoqWeightDtype
from .file_tensors import Stored
from .tensors import INDEX_DTYPES, check, check_rank, normalize_g_idx, require, resolve_group_size, shape_or_stored

FACTOR = "input_scale"
"""Name of the factors of a module's input."""

_LEVEL_OF_CODE = torch.tensor([7, 1, 2, 3, 4, 5, 6, 0, *range(8, 16)], dtype=torch.uint8)
_LINEAR = ".linear."


def without_wrappers(tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """`tensors` with ``<module>.linear.<key>`` as ``<module>.<key>``, where there is a ``<module>.input_scale``."""
    wrapped = {name.removesuffix(FACTOR) for name in tensors if name.endswith(f".{FACTOR}")}
    if not wrapped:
        return tensors
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        owner, found, key = name.rpartition(_LINEAR)
        result[f"{owner}.{key}" if found and f"{owner}." in wrapped else name] = tensor
    return result


def is_nf4(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors of a module, which GPTQ would have with `qzeros`, are those of NF4."""
    return "qzeros" not in tensors and "qweight" in tensors and "scales" in tensors and _has_rows(tensors)


def _has_rows(tensors: Mapping[str, torch.Tensor]) -> bool:
    scales, qweight = tensors["scales"], tensors["qweight"]
    return scales.dim() == qweight.dim() == 2 and scales.shape[0] == qweight.shape[0]


def read_nf4(
    tensors: Mapping[str, torch.Tensor], group_size: int | None, shape: tuple[int | None, int | None]
) -> QuantizedWeight:
    """Read the weight of a module in NF4; ValueError or TypeError for tensors that do not fit each other or `shape`."""
    qweight, scales = require(tensors, ("qweight", "scales"))
    check_rank("qweight", qweight, 2)
    check_rank("scales", scales, 2)
    rows, columns = shape_or_stored(shape, (qweight.shape[0], 8 * qweight.shape[1]))
    size = resolve_group_size(group_size, columns, scales.shape[1])
    scheme = WeightScheme(WoqWeightDtype.NF4, True, size)
    check("qweight", qweight, (torch.int32,), (rows, -(-columns // 8)))
    check("scales", scales, FLOAT_DTYPES, (rows, scheme.group_count(columns)))
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        check("g_idx", g_idx, INDEX_DTYPES, (columns,))
        g_idx = normalize_g_idx(g_idx, size, scheme.group_count(columns))
    codes = unpack_nibbles(as_bytes(qweight), 8 * qweight.shape[1])[:, :columns]
    packed = pack_nibbles(_LEVEL_OF_CODE[codes.int()])
    return QuantizedWeight(packed, scales.float(), None, g_idx, scheme, (rows, columns))
