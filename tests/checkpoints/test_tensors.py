import torch

from ipex_quant.checkpoints.tensors import e8m0_exponents, e8m0_scales


def test_every_exponent_is_that_of_its_scale():
    exponents = torch.arange(255, dtype=torch.uint8)
    found = e8m0_exponents(e8m0_scales(exponents))
    assert found is not None
    assert torch.equal(found, exponents)


def test_scales_that_are_no_powers_of_two_have_no_exponents():
    for number in (3.0, 0.0, -1.0, float("inf"), float("nan")):
        assert e8m0_exponents(torch.tensor([1.0, number])) is None, number
