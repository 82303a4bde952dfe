"""GGUF's blocks: bytes come back from what the reader makes of them, and what no block holds is told."""

import dataclasses
import re

import pytest
import torch

from ipex_quant.checkpoints.gguf_blocks import BLOCKS, read_blocks
from ipex_quant.checkpoints.writers.gguf_blocks import PACKINGS, block_kind, pack_blocks
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

ROWS, COUNT = 5, 3
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
HALVES |= {"Q6_K": (208,), "MXFP4": ()}


def random_rows(kind, seed=0):
    """Random bytes of blocks, with numbers between 0.5 and 1.5 where they hold float16."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (ROWS, COUNT, BLOCKS[kind].size), generator=generator, dtype=torch.uint8)
    for at in HALVES.get(kind, (0,)):
        numbers = torch.rand(ROWS, COUNT, 1, generator=generator) + 0.5
        raw[..., at : at + 2] = numbers.half().view(torch.uint8)
    if kind == "MXFP4":
        raw[..., 0] = raw[..., 0] % 255
    return raw.flatten(1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_come_back(kind):
    rows = random_rows(kind)
    weight = read_blocks(kind, rows)
    assert block_kind(weight) == (kind, None)
    assert torch.equal(pack_blocks(kind, weight), rows)


def test_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("ipex_quant.checkpoints.writers.gguf_blocks.SLICE_ELEMENTS", 2 * COUNT * 256)
    rows = random_rows("Q4_K")
    assert torch.equal(pack_blocks("Q4_K", read_blocks("Q4_K", rows)), rows)


@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT4, WoqWeightDtype.INT5])
@pytest.mark.parametrize("group_size", [32, 64, PER_CHANNEL])
def test_zero_points_become_minimums(dtype, group_size):
    values = torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(0))
    weight = affine.quantize(values, WeightScheme(dtype, False, group_size))
    weight = dataclasses.replace(weight, scales=torch.full_like(weight.scales, 2.0**-6))
    kind, reason = block_kind(weight)
    assert (kind, reason) == ({4: "Q4_1", 5: "Q5_1"}[dtype.bits], None)
    back = read_blocks(kind, pack_blocks(kind, weight))
    assert torch.equal(affine.dequantize(back), affine.dequantize(weight))


def test_a_block_of_zeros():
    rows = random_rows("Q6_K")
    rows[2, 208:210] = 0
    weight = read_blocks("Q6_K", rows)
    back = read_blocks("Q6_K", pack_blocks("Q6_K", weight))
    assert torch.equal(affine.dequantize(back), affine.dequantize(weight))


def changed(kind, **options):
    return dataclasses.replace(read_blocks(kind, random_rows(kind)), **options)


def plain(dtype, symmetric=True, group_size=32):
    return affine.quantize(torch.ones(2, 256), WeightScheme(dtype, symmetric, group_size))


def with_larger_scales(kind, name):
    """A weight with the name's values `limits` beyond what 6 bits hold."""
    weight = read_blocks(kind, random_rows(kind))
    supers = getattr(weight, f"super_{name}")
    values = getattr(weight, name).clone()
    values[0, 0] = 64 * supers[0, 0]
    return dataclasses.replace(weight, **{name: values})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (with_larger_scales("Q4_K", "scales"), "its scales are 0..64 times the super scales, Q4_K holds 0..63"),
        (with_larger_scales("Q5_K", "minimums"), "its minimums are 0..64 times the super minimums, Q5_K holds 0..63"),
        (changed("Q6_K", super_scales=torch.full((ROWS, COUNT), 0.3)), "its super scales are not float16"),
        (changed("Q3_K", super_scales=torch.full((ROWS, COUNT), 0.375)), "its scales are no integers times the super"),
        (changed("MXFP4", scales=torch.full((ROWS, COUNT), 0.3)), "its scales are no powers of two"),
        (changed("Q4_1", minimums=torch.full((ROWS, COUNT), 0.3)), "its minimums are not float16"),
        (changed("IQ4_NL", scales=torch.full((ROWS, COUNT), 0.3)), "its scales are not float16"),
        (plain(WoqWeightDtype.INT3), "GGUF has no INT3 weights with one float scale a group and no offsets"),
        (plain(WoqWeightDtype.INT6, False), "GGUF has no INT6 weights with one float scale a group and zero points"),
        (plain(WoqWeightDtype.INT8, False), "GGUF has no INT8 weights with one float scale a group and zero points"),
        (plain(WoqWeightDtype.FP8), "GGUF has no FP8 weights"),
        (plain(WoqWeightDtype.INT4, group_size=16), "GGUF has blocks of 32 input features, its groups have 16"),
    ],
)
def test_what_no_block_holds(weight, message):
    kind, reason = block_kind(weight)
    assert kind == ""
    assert re.match(re.escape(message), reason)


def test_every_type_that_is_read_is_written():
    assert PACKINGS.keys() == BLOCKS.keys()
