"""Folding a factor into a norm leaves the function what it was; where it would not, nothing happens."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ipex_quant.nn.norms import is_norm
from ipex_quant.smoothquant.folding import fold_into_norm

FACTOR = torch.tensor([0.5, 2.0, 1.0, 3.0])


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), LlamaRMSNorm(4), nn.LayerNorm(4, bias=False)])
def test_output_is_multiplied(norm):
    torch.manual_seed(0)
    for vector in norm.parameters():
        nn.init.normal_(vector)
    x = torch.randn(3, 5, 4)
    expected = norm(x) * FACTOR
    before = norm.weight.clone(), norm.weight
    assert is_norm(norm)
    assert fold_into_norm(norm, FACTOR)
    torch.testing.assert_close(norm(x), expected)
    assert isinstance(norm.weight, nn.Parameter)
    assert torch.equal(before[1], before[0]), "another module may hold the old parameter"


@pytest.mark.parametrize(
    "norm",
    [GemmaRMSNorm(4), nn.LayerNorm(4).bfloat16(), nn.LayerNorm(8)],
    ids=["adds one to its weight", "would round the factor", "another size"],
)
def test_left_alone(norm):
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert not fold_into_norm(norm, FACTOR)
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


def test_hooks_are_not_run_by_the_trial():
    norm = nn.LayerNorm(4)
    norm.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    assert fold_into_norm(norm, FACTOR)


def test_a_hook_that_sees_the_output_keeps_the_factor_out():
    norm = nn.LayerNorm(4)
    norm.register_forward_hook(lambda *_: pytest.fail("called"))
    assert not fold_into_norm(norm, FACTOR)
    assert torch.equal(norm.weight, torch.ones(4))


@pytest.mark.parametrize(
    "module", [nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm((2, 4)), nn.GroupNorm(2, 4)]
)
def test_what_is_no_norm_over_the_last_dimension(module):
    assert not is_norm(module) or not fold_into_norm(module, FACTOR)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_norms_of_other_dimensions_are_left_alone(width):
    for norm in (nn.BatchNorm1d(width).eval(), nn.GroupNorm(1, width), nn.InstanceNorm1d(width, affine=True)):
        assert not fold_into_norm(norm, torch.full((width,), 2.0))


def test_the_trial_takes_memory_for_a_few_tokens_only():
    norm, sizes = nn.LayerNorm(4096), []
    norm.forward = lambda x: sizes.append(x.numel()) or nn.functional.layer_norm(x, (4096,), norm.weight)
    fold_into_norm(norm, torch.full((4096,), 2.0))
    assert sizes
    assert max(sizes) < 16 * 4096
