"""LAMB and LARS against their formulas, in float64."""

import copy
import io

import pytest
import torch
from torch import nn

from ipex_quant.alias import install_as_ipex, uninstall_as_ipex
from ipex_quant.optim import Lamb, Lars, create_optimizer_lars


def gradients(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, generator=generator) for _ in range(count)]


def lamb(w, grads, lr, betas, eps, decay):
    """You et al., algorithm 2, with the identity for phi."""
    w, m, v = w.double(), 0.0, 0.0
    for count, g in enumerate((grad.double() for grad in grads), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        r = m / (1 - betas[0] ** count) / ((v / (1 - betas[1] ** count)).sqrt() + eps) + decay * w
        ratio = w.norm() / r.norm() if w.norm() > 0 and r.norm() > 0 else 1.0
        w = w - lr * ratio * r
    return w


def lars(w, grads, lr, momentum, eeta, decay):
    w, v = w.double(), 0.0
    for g in (grad.double() for grad in grads):
        ratio = eeta * w.norm() / (g.norm() + decay * w.norm()) if w.norm() > 0 and g.norm() > 0 else 1.0
        v = momentum * v + g + decay * w
        w = w - lr * ratio * v
    return w


def trained(kind, start, grads, **settings):
    param = nn.Parameter(start.clone())
    optimizer = kind([param], **settings)
    for grad in grads:
        param.grad = grad.to(start.dtype)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_formulas(dtype, tolerance, decay, zero):
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype) * (not zero)
    grads = [g.to(dtype) for g in gradients(3)]
    found = trained(Lamb, start, grads, lr=0.01, betas=(0.8, 0.9), weight_decay=decay)
    expected = lamb(start, grads, 0.01, (0.8, 0.9), 1e-8, decay)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    found = trained(Lars, start, grads, lr=0.01, momentum=0.9, eeta=0.5, weight_decay=decay)
    expected = lars(start, grads, 0.01, 0.9, 0.5, decay)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_lars_without_local_rates_is_sgd():
    start, grads = torch.ones(6, 5), gradients(3)
    found = trained(
        lambda params, **s: Lars([{"params": params, "lars": False}], **s), start, grads, lr=0.1, momentum=0.9
    )
    torch.testing.assert_close(found, trained(torch.optim.SGD, start, grads, lr=0.1, momentum=0.9))


def test_a_parameter_without_gradients_has_a_local_rate_of_1():
    start = torch.ones(6, 5)
    found = trained(Lars, start, [torch.zeros(6, 5)], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(found, torch.full((6, 5), 0.95))


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_as_an_optimizer(kind):
    """Closures, schedulers, copies and state dicts, one from IPEX with an integer step included."""
    param = nn.Parameter(torch.ones(4))
    optimizer = kind([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    buffer = io.BytesIO()
    state = copy.deepcopy(optimizer.state_dict())
    torch.save(state, buffer)
    if kind is Lamb:
        state["state"][0]["step"] = 3
    other = nn.Parameter(param.detach().clone())
    loaded = kind([other], lr=0.1)
    loaded.load_state_dict(state)
    copied_param, copied = copy.deepcopy((param, optimizer))
    for p, each in ((param, optimizer), (other, loaded), (copied_param, copied)):
        p.grad = torch.ones(4)
        each.step()
    assert torch.equal(param, other)
    assert torch.equal(param, copied_param)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Lamb, {"lr": -1}),
        (Lamb, {"eps": -1}),
        (Lamb, {"betas": (1.0, 0.9)}),
        (Lamb, {"betas": (0.9, -0.1)}),
        (Lamb, {"weight_decay": float("nan")}),
        (Lars, {"lr": -1}),
        (Lars, {"momentum": -1}),
        (Lars, {"eeta": 0}),
        (Lars, {"epsilon": -1}),
    ],
)
def test_settings_out_of_range(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind([nn.Parameter(torch.ones(1))], **settings)


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_refuses_what_it_cannot_update(kind):
    table, gaps = nn.Embedding(4, 3, sparse=True), nn.Parameter(torch.ones(4, 8)[:, ::2])
    optimizers = kind(table.parameters()), kind([gaps])
    (table(torch.tensor([1])).sum() + gaps.sum()).backward()
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match="dense"):
            optimizer.step()


@pytest.mark.parametrize("separately", [False, True])
def test_create_optimizer_lars(separately):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.LSTM(3, 3), nn.Linear(3, 3, bias=False))
    model[3].weight = model[0].weight
    optimizer = create_optimizer_lars(model, 0.1, 0.9, 0.01, separately, 1e-6)
    groups = [(len(g["params"]), g["weight_decay"], g["lars"]) for g in optimizer.param_groups]
    assert groups == ([(3, 0.01, True), (2, 0, False), (3, 0.01, False)] if separately else [(8, 0.01, True)])
    assert optimizer.defaults["epsilon"] == 1e-6


def test_are_where_ipex_had_them():
    install_as_ipex()
    try:
        from intel_extension_for_pytorch.optim import _lamb, _lars
    finally:
        uninstall_as_ipex()
    assert _lamb.Lamb is Lamb
    assert _lars.create_optimizer_lars is create_optimizer_lars
