import pytest
import torch

from ipex_quant.checkpoints.format import Int8Input
from ipex_quant.checkpoints.torchao import TorchaoFormat
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WoqWeightDtype

FORM = TorchaoFormat()


def module(lowest, highest, groups, zero_points=True, rows=6, columns=64):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(lowest, highest + 1, (rows, columns), generator=generator)
    scales = torch.rand(rows, groups, generator=generator) + 0.1
    zeros = torch.randint(lowest, highest + 1, scales.shape, generator=generator) if zero_points else torch.zeros(1)
    spread = [each.repeat_interleave(columns // groups, 1) if each.dim() > 1 else each for each in (scales, zeros)]
    tensors = {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scales}
    tensors |= {"_weight_zero_point": zeros.to(torch.int8)} if zero_points else {}
    return tensors, (codes - spread[1]) * spread[0]


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("lowest", "highest", "dtype"), [(-8, 7, WoqWeightDtype.INT4), (-128, 127, WoqWeightDtype.INT8)]
)
def test_integers(lowest, highest, dtype, groups, zero_points):
    tensors, weight = module(lowest, highest, groups, zero_points)
    qw = FORM.read("m", tensors, (6, 64))
    assert (qw.scheme.dtype, qw.scheme.symmetric) == (dtype, not zero_points)
    torch.testing.assert_close(dequantize(qw), weight, rtol=1e-6, atol=0)


def test_floats():
    weight, scales = torch.randn(6, 64).to(torch.float8_e4m3fn), torch.rand(6, 1)
    qw = FORM.read("m", {"_weight_qdata": weight, "_weight_scale": scales}, (None, None))
    assert torch.equal(dequantize(qw), weight.float() * scales)


def test_activations_are_quantized_if_the_configuration_says_so():
    kinds = {"Int8DynamicActivationInt8WeightConfig": Int8Input(), "Int8WeightOnlyConfig": None}
    for kind, expected in kinds.items():
        form = TorchaoFormat.from_config({"quant_type": {"default": {"_type": kind}}})
        assert form.int8_input("m", {}) == expected


def test_tensors_that_do_not_fit():
    tensors, _ = module(-8, 7, 4)
    with pytest.raises(ValueError, match=r"_weight_qdata: expected shape \[6, 32\]"):
        FORM.read("m", tensors, (6, 32))
    with pytest.raises(ValueError, match="_weight_scale: expected groups of one size in 64 columns"):
        FORM.read("m", tensors | {"_weight_scale": torch.ones(6, 5)}, (6, 64))
    with pytest.raises(ValueError, match="_weight_scale"):
        FORM.read("m", tensors | {"_weight_scale": torch.ones(7)}, (6, 64))
    with pytest.raises(ValueError, match=r"_weight_zero_point: expected shape \[24\]"):
        FORM.read("m", tensors | {"_weight_zero_point": torch.ones(6, dtype=torch.int8)}, (6, 64))
    with pytest.raises(TypeError, match="_weight_qdata: expected dtype"):
        FORM.read("m", tensors | {"_weight_qdata": tensors["_weight_qdata"].int()}, (6, 64))
