import pytest
import torch

from ipex_quant.numerics.intervals import Intervals

BOUNDARIES = {
    "even": [0.5, 1.5, 2.5],
    "powers of 2": [0.25, 0.5, 1.0, 2.0, 4.0],
    "around zero": [-115.5, -93.5, -0.3, 0.1, 7.0, 101.0],
    "close together": [-1e-4, 1e-4, 3.0],
    "two": [5.0, 10.0],
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_it_finds_what_a_search_finds(name):
    boundaries = torch.tensor(BOUNDARIES[name])
    spread = float(boundaries.abs().max())
    values = torch.randn(40, 1000, generator=torch.Generator().manual_seed(1)) * spread
    values[0, :6] = torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-40, -1e-40])
    neighbours = [boundaries, boundaries.nextafter(boundaries + 1), boundaries.nextafter(boundaries - 1)]
    values[1, : 3 * len(boundaries)] = torch.cat(neighbours)
    found = Intervals(boundaries).index(values.t())
    assert found.dtype == torch.int32
    assert torch.equal(found, torch.bucketize(values.t().contiguous(), boundaries, out_int32=True))
