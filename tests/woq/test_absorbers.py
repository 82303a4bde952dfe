import pytest
import torch
from torch import nn

from ipex_quant.woq.absorbers import find_absorber


class Block(nn.Module):
    """A linear `last` after a `first`, with `between` what happens to the output of the first."""

    def __init__(self, between, width=48, inputs=48, also=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, width), nn.Linear(inputs, 8)
        self.norm = nn.LayerNorm(32)
        self.between, self.also = between, also

    def forward(self, x):
        hidden = self.first(self.norm(x))
        out = self.last(self.between(hidden))
        return (out, {"also": out if self.also is None else self.also(hidden)})


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def absorber(block, members=("last",), candidates=("norm", "first"), x=X):
    block = block.to(x.dtype)
    with torch.no_grad():
        found = find_absorber(block, lambda: block(x), members, candidates)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "between", [lambda h: h, torch.relu, lambda h: h * h.detach().sign(), lambda h: -h / 3, lambda h: h.mean(1)]
)
def test_channels_that_stay_apart(between, dtype):
    found = absorber(Block(between), x=X.to(dtype))
    assert (found.name, found.width) == ("first", 48)
    assert torch.equal(found.sources, torch.arange(48))


@pytest.mark.parametrize(
    "between",
    [torch.tanh, nn.functional.silu, nn.functional.gelu, lambda h: h + 1, lambda h: h.cumsum(-1), lambda h: h * h],
)
def test_what_does_more_than_multiply(between):
    assert absorber(Block(between)) is None


def test_the_norm_before_a_linear():
    found = absorber(Block(torch.relu), members=("first",), candidates=("first", "norm"))
    assert (found.name, found.width) == ("norm", 32)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 49, 50, 200])
def test_repeated_and_permuted_channels_are_told_apart(width):
    order = torch.randperm(2 * width, generator=torch.Generator().manual_seed(2))
    found = absorber(Block(lambda h: h.repeat(1, 1, 2)[..., order], width, 2 * width))
    assert torch.equal(found.sources, order % width)


@pytest.mark.parametrize(
    ("width", "between", "start"),
    [
        (96, lambda h: torch.tanh(h[..., :48]) * h[..., 48:], 48),  # gate and up in one
        (64, lambda h: torch.tanh(h[..., :48] + h[..., 48:56].repeat(1, 1, 6)) * h[..., 56:].repeat(1, 1, 6), 56),
    ],
    ids=["gate and up", "q, k and v with fewer heads"],
)
def test_the_last_channels_of_a_fused_linear(width, between, start):
    found = absorber(Block(between, width))
    assert (found.name, found.width) == ("first", width)
    assert torch.equal(found.sources, start + torch.arange(48) % (width - start))


def test_an_output_that_something_else_reads_too():
    assert absorber(Block(torch.relu, also=lambda h: h.sum())) is None
    assert absorber(Block(torch.relu, also=lambda h: h[..., 40] > 1e9)) is not None


def test_channels_that_are_always_zero_have_no_source():
    found = absorber(Block(lambda h: h * (torch.arange(48) > 3)))
    assert torch.equal(found.sources, torch.where(torch.arange(48) > 3, torch.arange(48), -1))
    assert absorber(Block(torch.zeros_like)) is None


def test_a_group_that_is_not_reached():
    block = Block(torch.relu)
    block.other = nn.Linear(48, 8)
    assert absorber(block, members=("other",)) is None


def test_every_member_of_the_group_undoes_it():
    class Two(Block):
        def forward(self, x):
            hidden = torch.relu(self.first(x))
            return self.last(hidden) + self.second(input=hidden)

    block = Two(None)
    block.second = nn.Linear(48, 8)
    assert absorber(block) is None
    assert absorber(block, members=("last", "second")).name == "first"
