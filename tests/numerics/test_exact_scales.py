import pytest
import torch

from ipex_quant.numerics.exact_scales import exact_scales, super_quotients


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.5, -65504.0, 2.0**-24, 0.0], torch.float16),
        ([1.0, 2.0**-25], torch.bfloat16),
        ([1.0, 65536.0], torch.bfloat16),
        ([1 + 2.0**-10, 65536.0], torch.float32),
        ([0.1], torch.float32),
        ([], torch.float16),
    ],
)
def test_the_first_dtype_that_has_every_value(values, dtype):
    scales = torch.tensor(values)
    narrow = exact_scales(scales)
    assert narrow.dtype == dtype
    assert torch.equal(narrow.float(), scales)


def test_zero_keeps_its_sign():
    assert exact_scales(torch.tensor([-0.0])).signbit().all()


def test_other_dtypes():
    powers = torch.tensor([2.0**-16, 0.5, 32768.0])
    assert exact_scales(powers, (torch.float8_e5m2, torch.float16)).dtype == torch.float8_e5m2
    assert exact_scales(powers * 2, (torch.float8_e5m2, torch.float16)).dtype == torch.float32


def test_quotients_of_every_super_group():
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0, 5.0, 7.0]])
    assert super_quotients(values, torch.tensor([[0.5, -3.0, 0.0]])).tolist() == [
        [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]]
    ]
