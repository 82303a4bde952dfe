import pytest
import torch

from ipex_quant import ops
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.ops.woq_header import HEADER_BYTES, header_for, read_header


def packed(symmetric=False, group_size=32):
    scheme = WeightScheme(WoqWeightDtype.INT4, symmetric, group_size)
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    return ops.pack_weight(ops.quantize_weight(weight, scheme)).data


def test_fields_are_those_that_were_packed():
    header = read_header(packed())
    assert header[1:6] == (WoqWeightDtype.INT4, 70, 64, 32, 1)
    assert read_header(packed(symmetric=True, group_size=-1))[4:6] == (-1, 0)


def test_another_count_of_output_features_changes_nothing_else():
    data = packed()
    before = data.clone()
    header = header_for(data, 128)
    assert header.shape == (HEADER_BYTES,)
    assert read_header(header) == read_header(data)._replace(out_features=128)
    assert torch.equal(data, before)


@pytest.mark.parametrize("data", [torch.zeros(10, dtype=torch.uint8), torch.zeros(64), torch.zeros(8, 64).byte()])
def test_what_is_no_header_is_refused(data):
    with pytest.raises(ValueError, match="data: expected bytes of a packed weight"):
        ops.woq_dequantize(data, None, 1, 1)
