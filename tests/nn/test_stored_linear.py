import pytest
import torch
from torch import nn

from ipex_quant.nn.linears import is_linear, linear_shape, obstacle, weight_matrix
from ipex_quant.nn.stored_linear import StoredLinear, in_memory, is_stand_in


@pytest.fixture(params=[False, True])
def pair(request):
    linear = nn.Linear(6, 4, bias=request.param)
    reads = []

    def read():
        reads.append(1)
        return linear.weight.detach().clone()

    bias = None if linear.bias is None else linear.bias.detach()
    with torch.device("meta"):
        like = nn.Linear(6, 4, bias=request.param)
    return linear, StoredLinear(like, read, bias), reads


def test_it_computes_what_the_linear_layer_does(pair):
    linear, stored, _ = pair
    x = torch.randn(3, 6)
    assert torch.equal(stored(x), linear(x))
    assert torch.equal(weight_matrix(stored), linear.weight)
    assert (linear_shape(stored), stored.nbytes) == ((4, 6), sum(p.nbytes for p in linear.parameters()))
    assert is_linear(stored)
    assert obstacle(stored) is None
    assert all(torch.equal(value, linear.state_dict()[name]) for name, value in stored.state_dict().items())


def test_its_weight_is_not_in_memory(pair):
    _, stored, reads = pair
    assert is_stand_in(stored.weight)
    assert stored.weight.untyped_storage().nbytes() == 4
    assert stored.weight.isnan().all()
    assert not reads


def test_it_is_read_once_within_the_context(pair):
    linear, stored, reads = pair
    model = nn.Sequential(stored)
    with in_memory(model), in_memory(model):
        assert torch.equal(stored.weight, linear.weight)
        stored(torch.randn(1, 6))
        assert len(reads) == 1
        stored.weight.data = torch.zeros(4, 6)
        assert not stored(torch.zeros(1, 6) + 1).sub(0 if stored.bias is None else stored.bias).any()
    assert is_stand_in(stored.weight)
    assert torch.equal(stored.read_weight(), linear.weight)


def test_a_weight_in_memory_takes_a_gradient(pair):
    linear, stored, _ = pair
    x = torch.randn(5, 6)
    with in_memory(nn.Sequential(stored)):
        for layer in (linear, stored):
            layer.weight.requires_grad_(True)
            layer(x).square().sum().backward()
        assert torch.equal(stored.weight.grad, linear.weight.grad)
