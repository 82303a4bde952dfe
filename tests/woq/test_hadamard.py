import pytest
import torch

from ipex_quant.woq.hadamard import random_rotation


@pytest.mark.parametrize("size", [1, 2, 3, 64, 96, 576])
def test_it_is_orthogonal(size):
    rotation = random_rotation(size)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 576])
def test_one_feature_is_spread_over_others(size):
    power = size & -size
    rotated = random_rotation(size)[5]
    assert rotated.abs().max() <= power**-0.5 + 1e-12


def test_seeds_differ_and_repeat():
    assert torch.equal(random_rotation(24, 1), random_rotation(24, 1))
    assert not torch.equal(random_rotation(24, 1), random_rotation(24, 2))


def test_a_size_below_one():
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        random_rotation(0)
