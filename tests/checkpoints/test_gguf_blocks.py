"""Blocks of GGUF become the values that transformers' own formulas give, or those here, element by element."""

import pytest
import torch

from ipex_quant.checkpoints.gguf_blocks import BLOCKS, float_rows, read_blocks
from ipex_quant.numerics import affine
from ipex_quant.numerics.codebooks import E2M1_DOUBLED

HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()},
}
"""Where a block has float16 numbers; all other bytes may have any value."""


def random_rows(kind, rows=3, blocks=2, seed=0):
    size, generator = BLOCKS[kind].size, torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * blocks, size), generator=generator, dtype=torch.uint8)
    for at in HALVES[kind]:
        raw[:, at : at + 2] = torch.randn(rows * blocks, 1, generator=generator).half().view(torch.uint8)
    if kind == "MXFP4":
        raw[:, 0] = 120 + raw[:, 0] % 8
    return raw.reshape(rows, -1)


def half(block, at):
    return torch.tensor(block[at : at + 2], dtype=torch.uint8).view(torch.float16).item()


def by_element(kind, block):
    """The values of a block whose bytes are given, of the types that transformers has no formula for."""
    if kind == "MXFP4":
        codes = [byte & 15 for byte in block[1:]] + [byte >> 4 for byte in block[1:]]
        return [E2M1_DOUBLED[code].item() / 2 * 2.0 ** (block[0] - 127) for code in codes]
    start = 2 if kind == "Q5_0" else 4
    high = int.from_bytes(bytes(block[start : start + 4]), "little")
    low = block[start + 4 :]
    codes = [byte & 15 for byte in low] + [byte >> 4 for byte in low]
    codes = [code | (high >> k & 1) << 4 for k, code in enumerate(codes)]
    if kind == "Q5_0":
        return [half(block, 0) * (code - 16) for code in codes]
    return [half(block, 0) * code + half(block, 2) for code in codes]


def expected_of(kind, rows):
    blocks = rows.reshape(-1, BLOCKS[kind].size)
    if kind in ("Q5_0", "Q5_1", "MXFP4"):
        values = torch.tensor([by_element(kind, block) for block in blocks.tolist()])
    else:
        dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
        values = dequant.dequantize(blocks.flatten(), BLOCKS[kind].number)
    return values.reshape(len(rows), -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_exact(kind):
    rows = random_rows(kind)
    weight = read_blocks(kind, rows)
    expected = expected_of(kind, rows)
    assert weight.shape == tuple(expected.shape)
    assert torch.equal(affine.dequantize(weight), expected)
    assert torch.equal(float_rows(kind, rows), expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_slices_of_rows_change_nothing(kind, monkeypatch):
    rows = random_rows(kind, rows=5)
    whole = read_blocks(kind, rows)
    monkeypatch.setattr("ipex_quant.checkpoints.gguf_blocks.SLICE_ELEMENTS", 1)
    sliced = read_blocks(kind, rows)
    assert torch.equal(sliced.codes, whole.codes)
    assert torch.equal(sliced.scales, whole.scales)


@pytest.mark.parametrize(
    "kind", [kind for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS") if kind in BLOCKS]
)
def test_scales_are_integers_times_super_scales(kind):
    weight = read_blocks(kind, random_rows(kind))
    for values, supers in ((weight.scales, weight.super_scales), (weight.minimums, weight.super_minimums)):
        if values is not None:
            integers = values / supers.repeat_interleave(values.shape[1] // supers.shape[1], dim=1)
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
            assert integers.min() >= -128
            assert integers.max() <= 127


def test_scales_that_are_not_finite_are_refused():
    rows = random_rows("Q8_0")
    rows[0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    with pytest.raises(ValueError, match="scales: expected finite values"):
        read_blocks("Q8_0", rows)
