"""HQQ's modules, packed here as its `BitPack` does, part by part."""

import pytest
import torch

from ipex_quant.checkpoints.hqq import HqqFormat
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

PARTS = {8: (8, 1), 6: (8, 1), 5: (8, 1), 4: (4, 2), 3: (3, 10), 2: (2, 4)}
NAMES = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
DTYPES = {8: WoqWeightDtype.INT8, **{bits: WoqWeightDtype[f"INT{bits}"] for bits in (2, 3, 4, 5, 6)}}


def text(value):
    return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)


def pack(codes, bits):
    width, parts = PARTS[bits]
    step = -(-len(codes) // parts)
    codes = torch.cat((codes, codes.new_zeros(parts * step - len(codes), codes.shape[1])))
    packed = torch.zeros(step, codes.shape[1], dtype=torch.int64)
    for part in range(parts):
        packed |= codes[part * step : (part + 1) * step].long() << width * (parts - 1 - part)
    return packed.to(torch.int32 if bits == 3 else torch.uint8)


def make_module(bits=4, rows=16, columns=128, group=64, whole=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns // group
    codes = torch.randint(0, 1 << bits, (count, group), generator=generator)
    scales = (torch.rand(count, 1, generator=generator) + 0.5).half()
    zeros = (torch.rand(count, 1, generator=generator) * ((1 << bits) - 1)).half()
    zeros = zeros.round() if whole else zeros
    weight = ((codes - zeros.double()) * scales.double()).reshape(rows, columns)
    tensors = {
        "W_q": pack(codes, bits),
        "scale": scales,
        "zero": zeros,
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
        "shape": torch.tensor([rows, columns]),
        "packing": text(NAMES[bits]),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, weight


def read(tensors, shape=(16, 128)):
    return HqqFormat.from_config({"quant_method": "hqq"}).read("m", tensors, shape)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("bits", PARTS)
def test_read_is_what_the_format_says(bits, whole):
    tensors, weight = make_module(bits, whole=whole)
    qw = read(tensors)
    assert qw.scheme == WeightScheme(DTYPES[bits], False, 64, minimums=not whole)
    torch.testing.assert_close(dequantize(qw).double(), weight, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("rows", [5, 6, 15])
def test_rows_that_fill_no_word_of_3_bits(rows):
    tensors, weight = make_module(3, rows=rows, columns=64)
    torch.testing.assert_close(dequantize(read(tensors, (rows, 64))).double(), weight, rtol=2e-6, atol=2e-5)


def test_bytes_may_be_called_floats():
    tensors, weight = make_module(4)
    tensors["W_q"] = tensors["W_q"].view(torch.bfloat16)
    torch.testing.assert_close(dequantize(read(tensors)).double(), weight, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scale"), "scale: missing"),
        (lambda t: t.pop("shape"), "shape: missing"),
        (lambda t: t.pop("nbits"), "nbits: missing"),
        (lambda t: t.update(nbits=torch.tensor(1)), r"nbits: expected one of \[8, 6, 5, 4, 3, 2\], got 1"),
        (lambda t: t.update(axis=torch.tensor(0)), "axis: expected 1, groups of input features, got 0"),
        (lambda t: t.update(group_size=torch.tensor(48)), "group_size: expected a power of 2 that divides 128"),
        (lambda t: t.update(group_size=torch.tensor([1, 2])), "group_size: expected a whole number"),
        (lambda t: t.update(shape=torch.tensor([16, 1 << 40])), "shape: expected .16, 128., got"),
        (lambda t: t.update(packing=text("1bit_u8")), "packing: expected one of .*got '1bit_u8'"),
        (lambda t: t.update(W_q=t["W_q"][1:]), r"W_q: expected shape \[16, 64\], got \[15, 64\]"),
        (lambda t: t.update(scale=t["scale"][1:]), r"scale: expected shape \[32\], got \[31\]"),
        (lambda t: t.update(zero=t["zero"] * float("nan")), "expected finite values"),
        (lambda t: t.update(quant_zero=torch.tensor(1)), "quantized, too, are not supported"),
    ],
)
def test_inconsistent_tensors_are_refused(change, message):
    tensors, _ = make_module()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        read(tensors)


def test_codes_beyond_the_bits_are_refused():
    tensors, _ = make_module(5)
    tensors["W_q"][0, 0] = 32
    with pytest.raises(ValueError, match="expected codes below 32 for 5 bits, got 32"):
        read(tensors)
