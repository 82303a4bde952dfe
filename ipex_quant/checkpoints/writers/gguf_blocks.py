"""GGUF's blocks of quantized weights: the inverse of `checkpoints/gguf_blocks.py`, which has their bytes' sources.

A weight becomes the type of blocks that has its codes as they are. Groups of more features than a block's give each of
their blocks the same scale; zero points become minimums where float16 has these. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...numerics.affine import stored_codes
from ...numerics.exact_scales import super_quotients
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL
from ..gguf_blocks import BLOCKS, SLICE_ELEMENTS, Blocks
from ..tensors import e8m0_exponents

Parts = dict[str, torch.Tensor]
"""Of blocks ``[B]``: uint8 `codes` ``[B, elements]`` and what its type stores beside them, `d` and `m` float16
``[B, 1]``, or integers `scales` and `minimums` ``[B, groups]``."""


@dataclass(frozen=True)
class Packing:
    """How blocks of a type are made of their `parts`.

    `raised` blocks have minimums. `steps` are the lowest and highest integer that is a scale of a two-level type, and
    `raised_steps` those of its minimums.
    """

    pack: Callable[[Parts], torch.Tensor]
    raised: bool = False
    steps: tuple[int, int] | None = None
    raised_steps: tuple[int, int] | None = None


def block_kind(weight: QuantizedWeight) -> tuple[str, str | None]:
    """The type of blocks that holds `weight` exactly; or "" and the reason why none does."""
    scheme = weight.scheme
    two_level = scheme.super_group_size is not None
    alike = (
        kind
        for kind, packing in PACKINGS.items()
        if BLOCKS[kind].dtype == scheme.dtype
        and packing.raised == (not scheme.symmetric)
        and (packing.steps is not None) == two_level
    )
    kind = next(alike, None)
    if kind is None:
        levels = "two-level scales" if two_level else "one float scale a group"
        offsets = "no offsets" if scheme.symmetric else "minimums" if scheme.minimums else "zero points"
        return "", f"GGUF has no {scheme.dtype.name} weights with {levels} and {offsets}"
    reason = _layout_obstacle(kind, weight) or _number_obstacle(kind, weight)
    return ("", reason) if reason else (kind, None)


def _layout_obstacle(kind: str, weight: QuantizedWeight) -> str | None:
    blocks, scheme, columns = BLOCKS[kind], weight.scheme, weight.shape[1]
    if weight.g_idx is not None:
        return "its groups are in act-order, GGUF's are in the order of the input features"
    if columns % blocks.elements:
        return f"GGUF has blocks of {blocks.elements} input features as {kind}, it has {columns}"
    if PACKINGS[kind].steps is not None:
        if (scheme.group_size, scheme.super_group_size) != (blocks.group, blocks.elements):
            return f"{kind} has groups of {blocks.group} in blocks of {blocks.elements}, it is {scheme}"
    elif scheme.group_size not in (PER_CHANNEL, blocks.group) and scheme.group_size % blocks.group:
        return f"GGUF has blocks of {blocks.elements} input features, its groups have {scheme.group_size}"
    return None


def _number_obstacle(kind: str, weight: QuantizedWeight) -> str | None:
    packing = PACKINGS[kind]
    if kind == "MXFP4":
        exact = e8m0_exponents(2 * weight.scales) is not None
        return None if exact else "its scales are no powers of two, as MXFP4's are"
    if packing.steps is None:
        if not _is_half(weight.scales):
            return "its scales are not float16, GGUF's are; quantize it by a gptq recipe"
        if packing.raised and not _is_half(_minimums(weight)):
            what = "minimums" if weight.zero_points is None else "zero points times its scales"
            return f"its {what} are not float16, which GGUF's minimums are"
        return None
    for what, values, supers, limits in (
        ("scales", weight.scales, weight.super_scales, packing.steps),
        ("minimums", weight.minimums, weight.super_minimums, packing.raised_steps),
    ):
        if values is None or supers is None or limits is None:
            continue
        if not _is_half(supers):
            return f"its super {what} are not float16, GGUF's are"
        steps = _steps(values, supers)
        if not torch.equal((steps * supers.unsqueeze(2)).flatten(1), values):
            return f"its {what} are no integers times the super {what}, as GGUF's are"
        if steps.min() < limits[0] or steps.max() > limits[1]:
            return (
                f"its {what} are {int(steps.min())}..{int(steps.max())} times the super {what}, {kind} holds "
                f"{limits[0]}..{limits[1]}"
            )
    return None


def pack_blocks(kind: str, weight: QuantizedWeight) -> torch.Tensor:
    """Bytes uint8 ``[N, K / elements * size]`` of a weight for which `block_kind` gives `kind`."""
    blocks = BLOCKS[kind]
    rows, columns = weight.shape
    result = torch.empty(rows, columns // blocks.elements * blocks.size, dtype=torch.uint8)
    step = max(1, SLICE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        own = slice(start, min(start + step, rows))
        parts = _parts(kind, blocks, weight.select(own))
        result[own] = PACKINGS[kind].pack(parts).view(own.stop - own.start, -1)
    return result


def _parts(kind: str, blocks: Blocks, weight: QuantizedWeight) -> Parts:
    count = weight.shape[1] // blocks.elements
    codes = stored_codes(weight).view(torch.uint8).reshape(-1, blocks.elements)
    if kind == "MXFP4":
        exponents = e8m0_exponents(2 * weight.scales)  # codes are twice their values
        return {"codes": codes, "scales": _spread(torch.empty(0) if exponents is None else exponents, count)}
    raised = PACKINGS[kind].raised
    if weight.super_scales is None:
        parts = {"codes": codes, "d": _spread(weight.scales.half(), count)}
        return parts | ({"m": _spread(_minimums(weight).half(), count)} if raised else {})
    parts = {"codes": codes, "d": weight.super_scales.half().reshape(-1, 1)}
    parts["scales"] = _steps(weight.scales, weight.super_scales).flatten(0, 1)
    if weight.minimums is not None and weight.super_minimums is not None:
        parts["m"] = -weight.super_minimums.half().reshape(-1, 1)  # files hold what is subtracted
        parts["minimums"] = _steps(weight.minimums, weight.super_minimums).flatten(0, 1)
    return parts


def _spread(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers ``[N, groups]`` for each of `count` blocks of a row ``[N * count, 1]``."""
    return numbers.repeat_interleave(-(-count // numbers.shape[1]), dim=1)[:, :count].reshape(-1, 1)


def _is_half(values: torch.Tensor) -> bool:
    return torch.equal(values.half().float(), values)


def _minimums(weight: QuantizedWeight) -> torch.Tensor:
    if weight.zero_points is None:
        return weight.scales.new_zeros(()) if weight.minimums is None else weight.minimums
    return -(weight.scales * weight.zero_points)


def _steps(values: torch.Tensor, supers: torch.Tensor) -> torch.Tensor:
    """How many times ``[N, supers, groups]`` its super scale each value is; 0 where that is 0."""
    return super_quotients(values, supers).round()


def _raw(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)


def _nibbles(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Bytes of codes below 16: of each ``2 * run`` of them the first half is low, the second high."""
    low, high = (codes & 15).unflatten(1, (-1, 2, run)).unbind(2)
    return (low | high << 4).flatten(1)


def _joined(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes ``[B, count]`` of fields ``[B, fields, count]`` of `width` bits, the lowest first."""
    shifts = torch.arange(0, fields.shape[1] * width, width, dtype=torch.uint8)[:, None]
    return (fields << shifts).sum(1, dtype=torch.uint8)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    return _joined((codes >> 4).unflatten(1, (4, 8)).transpose(1, 2), 1)


def _in_quarters(fields: torch.Tensor) -> torch.Tensor:
    """Bytes ``[B, 64]`` of 256 fields of 2 bits: of each 128 in 32 bytes, four runs."""
    return torch.cat([_joined(half.unflatten(1, (4, 32)), 2) for half in fields.chunk(2, dim=1)], dim=1)


def _six_bits(parts: Parts) -> torch.Tensor:
    """Twelve bytes of eight scales and eight minimums of 6 bits."""
    scales, minimums = parts["scales"].to(torch.uint8), parts["minimums"].to(torch.uint8)
    (low, high), (least, most) = scales.chunk(2, dim=1), minimums.chunk(2, dim=1)
    bytes_of = (low | high >> 4 << 6, least | most >> 4 << 6, (high & 15) | (most & 15) << 4)
    return torch.cat(bytes_of, dim=1)


def _joined_bytes(*pieces: torch.Tensor) -> torch.Tensor:
    return torch.cat([_raw(piece) for piece in pieces], dim=1)


def _q4_0(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["d"], _nibbles(parts["codes"], 16))


def _q4_1(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["d"], parts["m"], _nibbles(parts["codes"], 16))


def _q5_0(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["d"], _fifth_bits(parts["codes"]), _nibbles(parts["codes"], 16))


def _q5_1(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["d"], parts["m"], _fifth_bits(parts["codes"]), _nibbles(parts["codes"], 16))


def _q8_0(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["d"], parts["codes"])


def _mxfp4(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["scales"], _nibbles(parts["codes"], 16))


def _q2_k(parts: Parts) -> torch.Tensor:
    scales = parts["scales"].to(torch.uint8) | parts["minimums"].to(torch.uint8) << 4
    return _joined_bytes(scales, _in_quarters(parts["codes"]), parts["d"], parts["m"])


def _q3_k(parts: Parts) -> torch.Tensor:
    codes, scales = parts["codes"], (parts["scales"] + 32).to(torch.uint8)
    low, high = (scales & 15).chunk(2, dim=1)
    in_twelve = torch.cat((low | high << 4, _joined((scales >> 4).unflatten(1, (4, 4)), 2)), dim=1)
    third = _joined((codes >> 2).unflatten(1, (8, 32)), 1)
    return _joined_bytes(third, _in_quarters(codes & 3), in_twelve, parts["d"])


def _q4_k(parts: Parts) -> torch.Tensor:
    return _joined_bytes(parts["d"], parts["m"], _six_bits(parts), _nibbles(parts["codes"], 32))


def _q5_k(parts: Parts) -> torch.Tensor:
    fifth = _joined((parts["codes"] >> 4).unflatten(1, (8, 32)), 1)
    return _joined_bytes(parts["d"], parts["m"], _six_bits(parts), fifth, _nibbles(parts["codes"], 32))


def _q6_k(parts: Parts) -> torch.Tensor:
    codes, scales = parts["codes"], parts["scales"].to(torch.int8)
    return _joined_bytes(_nibbles(codes, 64), _in_quarters(codes >> 4), scales, parts["d"])


def _iq4_xs(parts: Parts) -> torch.Tensor:
    scales = (parts["scales"] + 32).to(torch.uint8)
    high = _joined((scales >> 4).unflatten(1, (2, 4)).transpose(1, 2), 2)
    low = _joined((scales & 15).unflatten(1, (4, 2)).transpose(1, 2), 4)
    return _joined_bytes(parts["d"], high, low, _nibbles(parts["codes"], 16))


PACKINGS: Mapping[str, Packing] = {
    "Q4_0": Packing(_q4_0),
    "Q4_1": Packing(_q4_1, raised=True),
    "Q5_0": Packing(_q5_0),
    "Q5_1": Packing(_q5_1, raised=True),
    "Q8_0": Packing(_q8_0),
    "Q2_K": Packing(_q2_k, True, (0, 15), (0, 15)),
    "Q3_K": Packing(_q3_k, False, (-32, 31)),
    "Q4_K": Packing(_q4_k, True, (0, 63), (0, 63)),
    "Q5_K": Packing(_q5_k, True, (0, 63), (0, 63)),
    "Q6_K": Packing(_q6_k, False, (-128, 127)),
    "IQ4_NL": Packing(_q4_0),
    "IQ4_XS": Packing(_iq4_xs, False, (-32, 31)),
    "MXFP4": Packing(_mxfp4),
}
"""The types of blocks that are written."""
