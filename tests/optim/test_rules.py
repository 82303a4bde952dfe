"""Fused updates of masters and of parameters: those of the plain optimizer over float32 parameters."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from ipex_quant.optim import FullMaster, Lamb, Lars, SplitMaster, chunks, prepare_optimizer

SHAPES = [(7, 5), (3,), (), (2, 6, 3, 3), (0, 4), (40, 3)]
CASES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9, "nesterov": True, "maximize": True}),
    (Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (Adam, {"lr": torch.tensor(0.01), "amsgrad": True, "maximize": True}),
    (AdamW, {"lr": 0.01, "amsgrad": True}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    (Lamb, {"lr": 0.01, "weight_decay": 0.1}),
    (Lars, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
]
MASTERS = {"split": SplitMaster, "full": lambda p: FullMaster(p, torch.bfloat16)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks that end within parameters, and hold several."""
    monkeypatch.setattr(chunks, "ELEMENTS_PER_THREAD", 8)
    torch.manual_seed(0)


def parameters():
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    params[5].data = params[5].data.t().contiguous().t()
    return params


def give_gradients(params, others):
    """Random ones, of the dtype of `params`, and in another layout for every other one of `others`."""
    for number, (p, other) in enumerate(zip(params, others, strict=True)):
        grad = torch.randn(p.shape).to(torch.bfloat16)
        p.grad = grad.to(p.dtype) if number % 2 else grad.to(p.dtype).contiguous()
        other.grad = grad.to(other.dtype) + torch.zeros_like(other)


def prepared(kind, settings, params, make_master):
    optimizer = kind(params, **settings)
    prepare_optimizer(optimizer, {p: make_master(p) for p in params})
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


@pytest.mark.parametrize("masters", MASTERS)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_masters_follow_the_plain_optimizer(kind, settings, masters):
    plain_params = parameters()
    params = [nn.Parameter(p.detach().clone()) for p in plain_params]
    plain = kind(plain_params, **settings)
    optimizer = prepared(kind, settings, params, MASTERS[masters])
    for _ in range(3):
        give_gradients(params, plain_params)
        plain.step()
        optimizer.step()
        for p, expected in zip(params, plain_params, strict=True):
            value = optimizer._masters[p].value()
            torch.testing.assert_close(value, expected.detach(), rtol=2e-6, atol=1e-6)
            assert p.dtype == torch.bfloat16
            torch.testing.assert_close(p.float(), value, rtol=2**-8, atol=0)
    ours, theirs = optimizer.state_dict()["state"], plain.state_dict()["state"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), [case for case in CASES if case[0] not in (Lamb, Lars)])
def test_split_updates_have_the_bits_of_torchs_fused_ones(kind, settings):
    plain_params = [nn.Parameter(torch.randn(32)) for _ in range(2)]
    params = copy.deepcopy(plain_params)
    plain = kind(plain_params, **settings, fused=True)
    optimizer = prepared(kind, settings, params, SplitMaster)
    for _ in range(3):
        give_gradients(params, plain_params)
        plain.step()
        optimizer.step()
    for p, expected in zip(params, plain_params, strict=True):
        assert torch.equal(optimizer._masters[p].value(), expected)


@pytest.mark.parametrize("low", [-1, -0x8000])
def test_a_parameter_that_something_else_has_zeroed(low):
    param = nn.Parameter(torch.randn(20))
    optimizer = prepared(SGD, {"lr": 1.0, "weight_decay": 0.1}, [param], SplitMaster)
    optimizer._masters[param].low.fill_(low)
    param.data.zero_()
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(optimizer._masters[param].value(), torch.full((20,), -1.0))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_gradients_of_any_strides(kind):
    param, plain = nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(20))
    optimizer, plain_optimizer = prepared(kind, {"lr": 0.1}, [param], SplitMaster), kind([plain], lr=0.1)
    for grad in (torch.ones((), dtype=torch.bfloat16).expand(20), torch.arange(40.0).bfloat16()[::2]):
        param.grad, plain.grad = grad, grad.float()
        optimizer.step()
        plain_optimizer.step()
    torch.testing.assert_close(optimizer._masters[param].value(), plain.detach())


def test_values_that_are_not_finite():
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38, 1e-42, -0.0, 2.0])
    params = [nn.Parameter(values.clone())]
    optimizer = prepared(SGD, {"lr": 1.0}, params, SplitMaster)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    torch.testing.assert_close(optimizer._masters[params[0]].value(), values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(params[0].detach(), values.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("masters", MASTERS)
def test_a_parameter_moved_to_another_layout(masters):
    plain = nn.Parameter(torch.randn(2, 6, 3, 3))
    param = nn.Parameter(plain.detach().clone())
    optimizer, plain_optimizer = prepared(Adam, {}, [param], MASTERS[masters]), Adam([plain])
    for layout in (torch.contiguous_format, torch.channels_last):
        param.data = param.data.to(memory_format=layout)
        plain.grad = torch.randn_like(plain).bfloat16().float()
        param.grad = plain.grad.bfloat16()
        optimizer.step()
        plain_optimizer.step()
        torch.testing.assert_close(optimizer._masters[param].value(), plain.detach(), rtol=1e-6, atol=1e-6)


def test_what_a_rule_cannot_update_is_updated_as_before():
    """A parameter with gaps in memory, one with sparse gradients, one without master, and a group that is not fused."""
    table = nn.Embedding(6, 4, sparse=True)
    gaps, other, late = (
        nn.Parameter(torch.randn(4, 8)[:, ::2]),
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.ones(5)),
    )
    plain_table, plain = copy.deepcopy((table, [gaps, other, late]))
    for group in (table.weight, gaps, late):
        group.requires_grad_()
    optimizer = SGD([{"params": [table.weight, gaps, other]}, {"params": [late]}], 0.1)
    prepare_optimizer(optimizer, {p: SplitMaster(p) for p in (table.weight, gaps, late)})
    gaps.data = torch.empty(4, 8, dtype=torch.bfloat16)[:, ::2].copy_(gaps.data)
    optimizer.param_groups[0]["fused"] = True
    plain_optimizer = SGD([plain_table.weight, *plain], 0.1)
    rows = torch.tensor([1, 1, 4])
    (table(rows).float().sum() + gaps.float().square().sum() + other.sum() + late.float().sum()).backward()
    (plain_table(rows).sum() + plain[0].square().sum() + plain[1].sum() + plain[2].sum()).backward()
    with pytest.raises(RuntimeError, match="sparse"):  # as torch's fused update
        optimizer.step()
    optimizer.param_groups[0]["fused"] = False
    optimizer.step()
    plain_optimizer.step()
    pairs = zip((table.weight, gaps, other, late), (plain_table.weight, *plain), strict=True)
    for p, expected in pairs:
        torch.testing.assert_close(p.float(), expected.detach(), rtol=0.02, atol=0.02)
