import pytest
import torch

from ipex_quant.checkpoints.fp8 import Fp8Format
from ipex_quant.numerics.affine import dequantize

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 64]}
ROWS = {"quant_method": "fp8", "format": "float8_e4m3fn", "weight_scale_semantics": "inverse"}


def tensors(rows, columns, *scales):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale_inv": torch.rand(scales, generator=generator) + 0.5}


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (130, 200), (5, 30)])
def test_the_scale_of_a_block_multiplies_each_value(rows, columns):
    stored = tensors(rows, columns, -(-rows // 128), -(-columns // 64))
    expected = stored["weight"].float()
    for n in range(rows):
        for k in range(columns):
            expected[n, k] *= stored["weight_scale_inv"][n // 128, k // 64]
    qw = Fp8Format.from_config(BLOCKS).read("m", stored, (rows, columns))
    assert torch.equal(dequantize(qw), expected)


def test_gptqmodels_scales_divide():
    stored = tensors(6, 20, 6)
    qw = Fp8Format.from_config(ROWS).read("m", stored, (None, None))
    expected = stored["weight"].float() / stored["weight_scale_inv"][:, None]
    torch.testing.assert_close(dequantize(qw), expected, rtol=1e-6, atol=0)


def test_one_scale_for_all():
    stored = tensors(6, 20, 1)
    expected = stored["weight"].float() * stored["weight_scale_inv"]
    assert torch.equal(dequantize(Fp8Format.from_config({}).read("m", stored, (6, 20))), expected)


def test_a_weight_alone_is_a_float_one():
    form = Fp8Format.from_config(BLOCKS)
    assert not form.quantizes({"weight"})
    assert form.quantizes({"weight", "weight_scale_inv"})
    assert form.quantizes({"weight_scale_inv"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fmt": "e5m2"}, "fmt: expected 'e4m3', got 'e5m2'"),
        ({"weight_scale_semantics": "x"}, "weight_scale_semantics: expected 'inverse' or none"),
        ({"weight_block_size": [128]}, "weight_block_size: expected two sizes"),
        ({"weight_block_size": [0, 128]}, "weight_block_size: expected two sizes"),
        ({"weight_block_size": 128}, "weight_block_size: expected two sizes, got 128"),
    ],
)
def test_configurations_that_are_not_supported(config, message):
    with pytest.raises(ValueError, match=message):
        Fp8Format.from_config(config)


def test_tensors_that_do_not_fit():
    form = Fp8Format.from_config(BLOCKS)
    good = tensors(256, 128, 2, 2)
    with pytest.raises(ValueError, match=r"weight_scale_inv: expected shape \[2, 2\], got \[2, 3\]"):
        form.read("m", good | {"weight_scale_inv": torch.ones(2, 3)}, (256, 128))
    with pytest.raises(ValueError, match=r"weight: expected shape \[256, 64\]"):
        form.read("m", good, (256, 64))
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float8_e4m3fn, got torch\.int8"):
        form.read("m", good | {"weight": good["weight"].view(torch.int8)}, (256, 128))
    with pytest.raises(ValueError, match="nothing tells whether it multiplies or divides"):
        Fp8Format.from_config({}).read("m", tensors(6, 20, 6), (6, 20))
    with pytest.raises(ValueError, match="scales: expected finite values"):
        Fp8Format.from_config(ROWS).read("m", good | {"weight_scale_inv": torch.zeros(256)}, (256, 128))
