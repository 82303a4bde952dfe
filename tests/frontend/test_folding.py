import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.conversion.example import Example
from ipex_quant.frontend.folding import fold


def trained(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return model.eval()


def batch_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def folded(model, x, example=None, left=(), **flags):
    """Fold `model`, check that `left` BatchNorms are left, and that results are the same."""
    model = trained(model)
    expected = model(x)
    fold(model, **{"convolutions": True, "linears": True, **flags}, example=example)
    assert batch_norms(model) == list(left)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    return model


class Block(nn.Module):
    """Reads its convolution's output twice if `twice`, and cannot be traced by fx if `branches`."""

    def __init__(self, twice=False, branches=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.branches = twice, branches

    def forward(self, x):
        self.seen = x
        y = self.conv(x)
        z = self.bn(y)
        if self.branches and x.sum() > 1e9:
            z = z * 2
        return z + y if self.twice else z + x


class Outer(nn.Module):
    """Cannot be traced; its blocks can."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks if x.sum() < 1e9 else ():
            x = block(x)
        return x


IMAGE = torch.randn(2, 4, 5, 5)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 7)),
        ((nn.Conv2d(4, 6, 3, bias=False, groups=2), nn.BatchNorm2d(6, affine=False)), (2, 4, 7, 7)),
        ((nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 7, 7, 7)),
        ((nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 4)),
        ((nn.Linear(4, 6, bias=False), nn.BatchNorm1d(1)), (2, 1, 4)),
    ],
)
def test_pairs_in_a_row(layers, shape):
    folded(nn.Sequential(*layers, nn.ReLU()), torch.randn(shape))


def test_channels_of_three_dimensions_are_not_a_linear_layers_features():
    x = torch.randn(2, 3, 4)
    folded(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)), x, left=["1"])
    square = trained(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    fold(square, True, True, None)
    with pytest.raises(AssertionError, match="linear_bn_folding=False"):
        square(x)


def test_models_and_parts_that_can_be_traced():
    folded(Block(), IMAGE)
    folded(Block(twice=True), IMAGE, left=["bn"])
    folded(Outer(Block(), Block(twice=True)), IMAGE, left=["blocks.1.bn"])
    folded(Block(branches=True), IMAGE, left=["bn"])


def test_an_example_tells_what_tracing_cannot():
    folded(Block(branches=True), IMAGE, Example((IMAGE,)))
    folded(Block(branches=True, twice=True), IMAGE, Example((IMAGE,)), left=["bn"])


def test_tracing_leaves_no_traces():
    model = folded(Block(), IMAGE)
    model.seen = None
    model = trained(Outer(Block(branches=True)))
    fold(model, True, True, None)
    assert not hasattr(model.blocks[0], "seen")


def test_layers_that_are_called_twice_or_read_elsewhere_stay():
    class Twice(Block):
        def forward(self, x):
            return self.bn(self.conv(self.conv(x)))

    class Reads(Block):
        def forward(self, x):
            return super().forward(x) + self.conv.weight.sum()

    folded(Twice(), IMAGE, left=["bn"])
    folded(Reads(), IMAGE, left=["bn"])
    block = Block()
    folded(Outer(block, block), IMAGE)


def test_hooks_training_and_missing_statistics_keep_a_batch_norm():
    hooked = Block()
    hooked.conv.register_forward_hook(lambda module, args, output: None)
    folded(hooked, IMAGE, left=["bn"])
    model = trained(Block())
    model.bn.train()
    fold(model, True, True, None)
    assert batch_norms(model) == ["bn"]


def test_flags():
    def make():
        return nn.Sequential(nn.Conv2d(4, 3, 5), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4))

    folded(make(), IMAGE, convolutions=False, left=["1"])
    folded(make(), IMAGE, linears=False, left=["4"])
    optimized = ipex.optimize(trained(make()))
    assert batch_norms(optimized) == []
    assert batch_norms(ipex.optimize(trained(make()), conv_bn_folding=False)) == ["1"]
    assert batch_norms(ipex.optimize(trained(make()), level="O0")) == ["1", "4"]
    assert batch_norms(ipex.optimize(trained(make()), level="O0", linear_bn_folding=True)) == ["1"]
