import json

import pytest
import torch

from ipex_quant.checkpoints.bitsandbytes import BitsAndBytesFormat
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.codebooks import NF4_LEVELS

FP4_LEVELS = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25])
LEVELS = {"nf4": NF4_LEVELS, "fp4": torch.cat((FP4_LEVELS, -FP4_LEVELS))}
FORM = BitsAndBytesFormat()


def packed_state(**state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def module(kind, rows=6, columns=128, size=64, nested=False):
    """Tensors of a random module and its weight, value by value as the format's description has it."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows * columns,), generator=generator)
    factors = torch.rand(rows * columns // size, generator=generator) + 0.1
    state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": [rows, columns]}
    tensors = {"weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": LEVELS[kind]}
    if nested:
        levels, absmax = torch.linspace(-1, 1, 256), torch.randint(0, 256, factors.shape, generator=generator)
        groups = torch.rand(-(-len(factors) // 8), generator=generator)
        state |= {"nested_blocksize": 8, "nested_offset": 0.75, "nested_dtype": "float32"}
        factors = torch.stack([levels[absmax[i]] * groups[i // 8] + 0.75 for i in range(len(factors))])
        tensors |= {"weight.nested_absmax": groups, "weight.nested_quant_map": levels}
    tensors["weight.absmax"] = absmax.to(torch.uint8) if nested else factors
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = packed_state(**state)
    weight = torch.stack([LEVELS[kind][code] * factors[i // size] for i, code in enumerate(codes)])
    return tensors, weight.view(rows, columns)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind, nested):
    tensors, weight = module(kind, nested=nested)
    qw = FORM.read("m", tensors, (6, 128))
    assert qw.scheme.dtype.bits == 4
    torch.testing.assert_close(dequantize(qw), weight, rtol=1e-6, atol=1e-7)


def test_eight_bits():
    weight = torch.randint(-127, 128, (4, 10), dtype=torch.int8)
    factors = torch.rand(4) + 0.1
    tensors = {"weight": weight, "SCB": factors, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    qw = FORM.read("m", tensors, (4, 10))
    torch.testing.assert_close(dequantize(qw), weight * factors[:, None] / 127, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"weight_format: expected 0"):
        FORM.read("m", tensors | {"weight_format": torch.tensor(2, dtype=torch.uint8)}, (4, 10))
    with pytest.raises(ValueError, match=r"SCB: expected shape \[4\]"):
        FORM.read("m", tensors | {"SCB": torch.ones(3)}, (4, 10))


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({STATE: torch.tensor([1, 2], dtype=torch.uint8)}, "quant_state: not valid JSON"),
        ({STATE: packed_state(shape=[6, 128])}, "expected a shape .* and a blocksize"),
        ({STATE: packed_state(shape=[6, -128], blocksize=64)}, "expected a shape"),
        ({STATE: packed_state(shape="ab", blocksize=64)}, "expected a shape"),
        ({STATE: packed_state(shape=[6, 128], blocksize=64, nested_offset="x")}, "nested_offset: expected a number"),
        ({STATE: packed_state(shape=[4, 192], blocksize=64)}, r"expected shape \[6, 128\], got \[4, 192\]"),
        ({STATE: packed_state(shape=[6, 128], blocksize=96)}, "blocks of 96 codes go across rows of 128"),
        ({STATE: packed_state(shape=[6, 128], blocksize=32)}, r"weight.absmax: expected shape \[24\]"),
        ({"weight": torch.zeros(10, 1, dtype=torch.uint8)}, r"weight: expected shape \[384\], got \[10\]"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "weight.quant_map: expected the values of NF4"),
        ({"weight.absmax": torch.full((12,), torch.nan)}, "scales: expected finite values"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors, _ = module("nf4")
    with pytest.raises(ValueError, match=message):
        FORM.read("m", tensors | change, (6, 128))


def test_parts_of_a_module_are_not_taken_for_a_float_one():
    tensors, _ = module("nf4")
    assert not FORM.quantizes({"weight"})
    assert FORM.quantizes(set(tensors) - {"weight"})
    for key in set(tensors):
        with pytest.raises(ValueError, match="missing, the checkpoint holds only"):
            FORM.read("m", {name: tensor for name, tensor in tensors.items() if name != key}, (6, 128))
