"""`float_layers`: the layers that the argument `op_type_dict` leaves in float, by operator type or name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn.embeddings import is_embedding
from ..nn.linears import is_convolution, is_linear
from ..nn.multihead_attention import named_layers

_TYPES = {
    "linear": is_linear,
    "conv1d": lambda module: isinstance(module, nn.Conv1d) or (is_linear(module) and not isinstance(module, nn.Linear)),
    "conv2d": lambda module: isinstance(module, nn.Conv2d),
    "conv3d": lambda module: isinstance(module, nn.Conv3d),
    "embedding": is_embedding,
}
_NEVER_QUANTIZED = {
    *("add", "matmul", "bmm", "relu", "flatten", "embeddingbag", "embedding_bag", "lstm", "convtranspose2d"),
    *("convtranspose3d", "maxpool2d", "max_pool2d", "avgpool2d", "avg_pool2d", "adaptiveavgpool2d", "interaction"),
    *("adaptive_avg_pool2d", "layernorm", "gelu", "silu", "softmax"),
}
"""Operator types of neural-compressor that are never quantized here."""

_DTYPES = {"fp32": False, "float32": False, "bf16": False, "bfloat16": False, "int8": True, "uint8": True}
"""Names of dtypes, and whether a layer of that dtype is quantized."""


def float_layers(model: nn.Module, op_type_dict: Mapping[str, Any] | None) -> frozenset[str]:
    """Names of the layers of `model` that `op_type_dict` leaves in float.

    Keys are neural-compressor's operator types (case-insensitive), names of layers, or regular expressions that match
    whole names. Values are ``{"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}``: a layer stays in
    float if one of the given lists has no 8-bit dtype. Raises TypeError or ValueError for another form, for an unknown
    type or dtype, and for a name that no layer has.
    """
    if op_type_dict is None:
        return frozenset()
    if not isinstance(op_type_dict, Mapping):
        raise TypeError(f"op_type_dict: expected a dict of operator types, got {type(op_type_dict).__name__}")
    kinds = is_linear, is_convolution, is_embedding
    layers = {name: module for name, module in named_layers(model) if any(is_kind(module) for is_kind in kinds)}
    left = set()
    for key, constraint in op_type_dict.items():
        chosen = _chosen(key, layers)
        if not _allows_int8(key, constraint):
            left |= chosen
    return frozenset(left)


def _chosen(key: Any, layers: Mapping[str, nn.Module]) -> set[str]:
    if not isinstance(key, str):
        raise TypeError(f"op_type_dict: expected names of operator types or layers as keys, got {key!r}")
    kind = key.lower()
    if kind in _TYPES:
        return {name for name, module in layers.items() if _TYPES[kind](module)}
    if kind in _NEVER_QUANTIZED:
        return set()
    try:
        chosen = {name for name in layers if name == key or re.fullmatch(key, name)}
    except re.error as error:
        raise ValueError(f"op_type_dict: {key!r} is no operator type and no regular expression: {error}") from error
    if not chosen:
        known = ", ".join(sorted(_TYPES.keys() | _NEVER_QUANTIZED))
        raise ValueError(f"op_type_dict: {key!r} is no known operator type ({known}) and no layer has such a name")
    return chosen


def _allows_int8(key: str, constraint: Any) -> bool:
    form = 'expected {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}'
    if not isinstance(constraint, Mapping) or not constraint.keys() <= {"weight", "activation"} or not constraint:
        raise ValueError(f"op_type_dict: {key}: {form}, got {constraint!r}")
    allowed = True
    for part, settings in constraint.items():
        dtypes = settings.get("dtype") if isinstance(settings, Mapping) and settings.keys() == {"dtype"} else None
        if not isinstance(dtypes, (list, tuple)) or not dtypes:
            raise ValueError(f"op_type_dict: {key}: {part}: {form}; only dtype can be constrained, got {settings!r}")
        unknown = [dtype for dtype in dtypes if dtype not in list(_DTYPES)]
        if unknown:
            raise ValueError(f"op_type_dict: {key}: {part}: expected dtypes of {', '.join(_DTYPES)}, got {unknown}")
        allowed = allowed and any(_DTYPES[dtype] for dtype in dtypes)
    return allowed
