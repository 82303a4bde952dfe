import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.nn.prepacked import prepack
from ipex_quant.nn.prepacked_group import GroupedLinear, LinearGroup


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 5), nn.Linear(12, 6, bias=False), nn.Linear(12, 7)

    def forward(self, x, y=None):
        return self.q(x), self.k(x if y is None else y), self.v(x if y is None else y)


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    group = LinearGroup([block.q, block.k, block.v])
    for index, module in enumerate(group.members):
        prepack(GroupedLinear(module, group, index))
    return block


def check(block, x, y=None):
    y = x if y is None else y
    expected = (
        F.linear(x, block.q.weight, block.q.bias),
        F.linear(y, block.k.weight),
        block.v.bias + y @ block.v.weight.T,
    )
    actual = block(x, y)
    assert all(part.is_contiguous() for part in actual)
    torch.testing.assert_close(actual, expected)


def products(block):
    """Numbers of results of each product that the block's group makes from here on."""
    counts, group = [], block.q.forward.group
    compute = group._compute
    group._compute = lambda *args: counts.append(len(group.members)) or compute(*args)
    return counts


def test_one_product_serves_all_members(block):
    counts = products(block)
    for shape in ((10, 12), (2, 30, 12), (2, 1, 5, 12)):
        check(block, torch.randn(shape))
    assert counts == [3, 3, 3]
    assert block.q.forward.group._last is None


def test_few_rows_are_multiplied_by_the_weights_themselves(block):
    counts = products(block)
    for shape in ((12,), (1, 12), (4, 1, 12)):
        check(block, torch.randn(shape))
    check(block, torch.randn(2, 12), torch.randn(3, 12))
    assert not counts
    assert block.q.forward.group.is_together


def test_changes_of_parameters_and_inputs_are_noticed(block):
    x = torch.randn(10, 12)
    check(block, x)
    block.v.bias.add_(1)
    block.k.weight = nn.Parameter(block.k.weight * 2, False)
    x.mul_(3)
    check(block, x)
    first = block.q(x)
    x.add_(1)
    torch.testing.assert_close(block.k(x), F.linear(x, block.k.weight))
    assert not torch.equal(first, block.q(x))


def test_members_that_read_another_tensor_are_computed_alone_afterwards(block):
    counts = products(block)
    for _ in range(2):
        check(block, torch.randn(10, 12), torch.randn(9, 12))
    assert len(counts) == 2
    assert not block.q.forward.group.is_together


def test_copies_are_groups_of_their_own(block):
    x = torch.randn(10, 12)
    check(block, x)
    block.q(x)
    other = copy.deepcopy(block)
    assert other.q.forward.group.members == [other.q, other.k, other.v]
    assert other.q.forward.group._last is None
    other.q.weight.zero_()
    check(other, x)
    check(block, x)


def test_threads(block):
    x = torch.randn(10, 12)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: check(block, each), [x, x.clone()] * 20))


def test_gradients_and_lower_precision(block):
    x = torch.randn(10, 12)
    block.requires_grad_(True)
    sum(part.sum() for part in block(x)).backward()
    assert torch.allclose(block.k.weight.grad, x.sum(0).expand(6, 12))
    block.bfloat16().requires_grad_(False)
    for actual, layer in zip(block(x.bfloat16()), (block.q, block.k, block.v), strict=True):
        assert actual.dtype == torch.bfloat16
        expected = x @ layer.weight.float().T + (0 if layer.bias is None else layer.bias.float())
        torch.testing.assert_close(actual.float(), expected, rtol=0.03, atol=0.03)
