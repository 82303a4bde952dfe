"""The tensors that state dicts and files hold of a `QuantizedWeight` or a `QuantizedStack`, in as few bytes as it has.

- `codes`: those of 2, 3, 5 and 6 bits are a stream of bits along K, uint8 ``[N, ceil(K * bits / 8)]``, as
  `bit_streams` defines it; those of 4 and 8 bits are as they are.
- `scales`, `minimums`, `super_scales`, `super_minimums`: in the first of `FLOATS` that has every value.
- `scale_factors`, `minimum_factors`, in place of `scales` and `minimums` where a weight has super scales: int8, or
  float8_e4m3fn ``[N, groups]``, the numbers that the super scales and super minimums are multiplied by.
- `zero_points`: int8.
- `g_idx`: as it is.

The scheme alone says which tensors there are and their shapes. Their dtypes tell themselves, and a wider one has the
same meaning: releases of transformers cast what they load to the dtype of the place that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .bit_streams import pack_stream, stream_bytes, unpack_stream
from .exact_scales import exact_scales, super_quotients
from .nibbles import pack_nibbles, unpack_nibbles
from .quantized_stack import QuantizedStack
from .quantized_weight import Place, QuantizedWeight, check_tensor, code_columns, code_dtype, tensor_places
from .scheme import WeightScheme, WoqWeightDtype

FLOATS = (torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of saved floats. Powers of two mostly are float8 numbers."""

FACTORS = {"scales": "scale_factors", "minimums": "minimum_factors"}
"""Names of the tensors that are saved in place of products with super scales."""

SAVED_NAMES = (*QuantizedWeight.names, *FACTORS.values())
"""Names of the tensors."""

_SUPERS = {"scales": "super_scales", "minimums": "super_minimums"}
_FACTOR_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float32)
_DTYPES = {
    **dict.fromkeys((*_SUPERS, *_SUPERS.values()), FLOATS),
    **dict.fromkeys(FACTORS.values(), _FACTOR_DTYPES),
    "zero_points": (torch.int8, torch.int16),
    "g_idx": (torch.int32,),
}


def saved_places(scheme: WeightScheme, shape: tuple[int, ...], act_order: bool) -> dict[str, Place | None]:
    """The widest dtype, and the shape, of each saved tensor, by name; None for those that the scheme has not.

    `shape` is that of a `QuantizedWeight` or a `QuantizedStack`.
    """
    *experts, rows, columns = shape
    places: dict[str, Place | None] = {}
    for name, place in tensor_places(scheme, (rows, columns), act_order).items():
        factors = scheme.super_group_size is not None and name in FACTORS
        places[name] = None if factors else place
        if name in FACTORS:
            places[FACTORS[name]] = place if factors else None
    places["codes"] = code_dtype(scheme.dtype), (rows, _saved_columns(scheme.dtype, columns))
    return {name: place and (place[0], (*experts, *place[1])) for name, place in places.items()}


def to_saved(weight: QuantizedWeight | QuantizedStack) -> dict[str, torch.Tensor]:
    """The saved tensors of `weight` by name, without those that the scheme has not.

    Raises ValueError when scales are no multiples of their super scales, as `ops.pack_weight` does.
    """
    tensors = weight.tensors()
    saved = {}
    for name, tensor in tensors.items():
        if name in FACTORS and _SUPERS[name] in tensors:
            saved[FACTORS[name]] = _factors(name, tensor, tensors[_SUPERS[name]])
        elif name == "codes":
            saved[name] = _streamed(tensor, weight.scheme.dtype, weight.shape[-1])
        elif name == "zero_points":
            saved[name] = tensor.to(torch.int8)
        else:
            saved[name] = exact_scales(tensor, FLOATS) if tensor.is_floating_point() else tensor
    return saved


def saved_weight(
    tensors: Mapping[str, torch.Tensor | None], scheme: WeightScheme, shape: tuple[int, int]
) -> QuantizedWeight:
    """The weight whose saved tensors are `tensors`; raises as `QuantizedWeight` does."""
    return QuantizedWeight(**_plain(tensors, scheme, shape), scheme=scheme, shape=shape)


def saved_stack(
    tensors: Mapping[str, torch.Tensor | None], scheme: WeightScheme, shape: tuple[int, int, int]
) -> QuantizedStack:
    """The stack whose saved tensors are `tensors`; raises as `QuantizedStack` does."""
    return QuantizedStack(**_plain(tensors, scheme, shape), scheme=scheme, shape=shape)


def _plain(tensors: Mapping[str, torch.Tensor | None], scheme: WeightScheme, shape: tuple[int, ...]) -> dict[str, Any]:
    places = saved_places(scheme, shape, tensors.get("g_idx") is not None)
    plain: dict[str, Any] = dict.fromkeys(QuantizedWeight.names)
    for name, place in places.items():
        tensor = tensors.get(name)
        if (tensor is None) != (place is None):
            raise ValueError(f"{name}: a {scheme} weight must {'not ' if place is None else ''}have them")
        if tensor is not None and place is not None:
            dtype, own_shape = place
            check_tensor(name, tensor, _DTYPES.get(name, (dtype,)), own_shape)
            plain[name] = tensor.to(dtype)
    for name, saved_name in FACTORS.items():
        if (factors := plain.pop(saved_name, None)) is not None:
            plain[name] = _products(factors, plain[_SUPERS[name]])
    plain["codes"] = _unstreamed(plain["codes"], scheme.dtype, shape[-1])
    return plain


def _factors(name: str, values: torch.Tensor, supers: torch.Tensor) -> torch.Tensor:
    quotients = super_quotients(values, supers).flatten(-2)
    for factors in (quotients.round().clamp(-128, 127).to(torch.int8), quotients.to(torch.float8_e4m3fn)):
        if torch.equal(_products(factors, supers), values):
            return factors
    raise ValueError(
        f"{name}: expected integers in -128..127, or float8 e4m3 numbers, times {_SUPERS[name]}, got others"
    )


def _products(factors: torch.Tensor, supers: torch.Tensor) -> torch.Tensor:
    return factors.float() * supers.repeat_interleave(factors.shape[-1] // supers.shape[-1], dim=-1)


def _is_stream(dtype: WoqWeightDtype) -> bool:
    return dtype.bits not in (4, 8)


def _saved_columns(dtype: WoqWeightDtype, columns: int) -> int:
    return stream_bytes(columns, dtype.bits) if _is_stream(dtype) else code_columns(dtype, columns)


def _streamed(codes: torch.Tensor, dtype: WoqWeightDtype, columns: int) -> torch.Tensor:
    if not _is_stream(dtype):
        return codes
    rows = codes.flatten(0, -2)
    fields = unpack_nibbles(rows, columns) if dtype.bits < 4 else rows
    return pack_stream(fields, dtype.bits).reshape(*codes.shape[:-1], stream_bytes(columns, dtype.bits))


def _unstreamed(codes: torch.Tensor, dtype: WoqWeightDtype, columns: int) -> torch.Tensor:
    if not _is_stream(dtype):
        return codes
    fields = unpack_stream(codes.flatten(0, -2), dtype.bits, columns)
    rows = pack_nibbles(fields) if dtype.bits < 4 else fields
    return rows.reshape(*codes.shape[:-1], code_columns(dtype, columns))
