"""Slow, literal oracles of the GPTQ format, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch


def _word(value: int) -> int:
    """An unsigned 32-bit value as int32 holds it."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _pack_column(values: list[int], bits: int) -> list[int]:
    """One column of fields in words, as the format's description spells it out for each width."""
    if bits != 3:
        per_word = 32 // bits
        words = [0] * -(-len(values) // per_word)
        for k, value in enumerate(values):
            words[k // per_word] |= value << (bits * (k % per_word))
        return [_word(word) for word in words]
    words = []
    for start in range(0, len(values), 32):  # 32 values in three words: 10, one across, 10, one across, 10
        v = (values[start : start + 32] + [0] * 32)[:32]
        first = sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 0b11) << 30
        second = v[10] >> 2 | sum(v[11 + i] << (3 * i + 1) for i in range(10)) | (v[21] & 0b1) << 31
        third = v[21] >> 1 | sum(v[22 + i] << (3 * i + 2) for i in range(10))
        words += [first, second, third]
    return [_word(word) for word in words]


@dataclass
class GptqModule:
    """The tensors of one module, and the weight they stand for."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    codes: torch.Tensor
    zero_points: torch.Tensor


def _make(bits: int, out_features: int, in_features: int, group_size: int, **options: object) -> GptqModule:
    """A random module; options: v2, act_order, zero_points ("random", or the value of all), seed."""
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    length = in_features if group_size == -1 else group_size
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator)
    first = 0 if options.get("v2") else 1
    zero = options.get("zero_points", "random")
    if zero == "random":
        zero_points = torch.randint(first, first + (1 << bits), (out_features, groups), generator=generator)
    else:
        zero_points = torch.full((out_features, groups), zero)
    scales = (torch.rand(out_features, groups, generator=generator) + 0.5).half()
    g_idx = torch.arange(in_features) // length
    if options.get("act_order"):
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    weight = torch.empty(out_features, in_features)
    for n in range(out_features):
        for k in range(in_features):
            g = int(g_idx[k])
            weight[n, k] = float(scales[n, g]) * (int(codes[n, k]) - int(zero_points[n, g]))
    qweight = [_pack_column(row, bits) for row in codes.tolist()]
    qzeros = [_pack_column(row, bits) for row in (zero_points.t() - first).tolist()]
    tensors = {
        "qweight": torch.tensor(qweight, dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales.t().contiguous(),
        "g_idx": g_idx.int(),
    }
    return GptqModule(tensors, weight, codes, zero_points)


@pytest.fixture
def make_gptq_module():
    return _make


@pytest.fixture
def pack_column():
    return _pack_column
