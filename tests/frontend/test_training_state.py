"""What surrounds a training step: state dicts, copies, schedulers, scalers, closures, groups, and warnings."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import StepLR

import ipex_quant as ipex
from ipex_quant.optim import Lamb, Lars

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "SGD": lambda params: SGD(params, 0.1, momentum=0.9),
    "Adam": lambda params: Adam(params, 0.01, amsgrad=True),
    "AdamW": lambda params: AdamW(params, 0.01),
    "Adagrad": lambda params: Adagrad(params, 0.1),
    "Lamb": lambda params: Lamb(params, 0.01, weight_decay=0.1),
    "Lars": lambda params: Lars(params, 0.1, momentum=0.9, eeta=0.1),
}
WITHOUT_FUSED = {
    "RMSprop": lambda params: RMSprop(params, 0.01),
    "NAdam": lambda params: NAdam(params, 0.01),
}


class Tied(nn.Module):
    """An embedding that is also the output layer, with a norm and a frozen layer between."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.frozen(x @ self.embedding.weight.to(x.dtype))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied().train()


def loss_of(model, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(X).float().square().mean()


def train(model, optimizer, steps=2, dtype=torch.bfloat16):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, dtype)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_checkpoint_as_without(name, split, fuse, model):
    """In a copy, in a new optimized model, and from there in a plain one and back."""
    options = {"split_master_weight_for_bf16": split, "fuse_update_step": fuse}
    plain = copy.deepcopy(model)
    optimized, optimizer = ipex.optimize(model, torch.bfloat16, OPTIMIZERS[name](model.parameters()), **options)
    assert optimized.head.weight is optimized.embedding.weight
    frozen = optimized.frozen.weight.detach().clone()
    train(optimized, optimizer)
    same(optimized.frozen.weight.detach(), frozen)
    buffer = io.BytesIO()
    torch.save((optimized.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    states = torch.load(buffer)

    other, other_optimizer = ipex.optimize(plain, torch.bfloat16, OPTIMIZERS[name](plain.parameters()), **options)
    train(other, other_optimizer, 1)
    other.load_state_dict(states[0])
    other_optimizer.load_state_dict(states[1])
    copied, copied_optimizer = copy.deepcopy((optimized, optimizer))
    pickled, pickled_optimizer = pickle.loads(pickle.dumps((optimized, optimizer)))

    plain_optimizer = OPTIMIZERS[name](plain.parameters())
    plain.load_state_dict(states[0])
    plain_optimizer.load_state_dict(copy.deepcopy(states[1]))
    back, back_optimizer = ipex.optimize(plain, torch.bfloat16, plain_optimizer, **options)

    expected = train(optimized, optimizer)
    for each in ((other, other_optimizer), (copied, copied_optimizer), (pickled, pickled_optimizer)):
        same(train(*each), expected)
        same(each[0].state_dict(), optimized.state_dict())
        same(each[1].state_dict()["state"], optimizer.state_dict()["state"])
    same(train(back, back_optimizer), expected)
    torch.testing.assert_close(train(plain, plain_optimizer), expected, rtol=0.02, atol=0)
    assert {value.dtype for value in plain_optimizer.state_dict()["state"][0].values()} == {torch.float32}


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": False}, {"capturable": True}, {"maximize": True}])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_options_of_optimizers(kind, options, model):
    plain = copy.deepcopy(model)
    plain_options = {key: value for key, value in options.items() if key != "capturable"}  # which changes no value
    plain_optimizer = kind(plain.parameters(), 0.01, **plain_options)
    optimized, optimizer = ipex.optimize(model, torch.bfloat16, kind(model.parameters(), 0.01, **options))
    fused = not (options.get("foreach") or options.get("fused") is False)
    assert bool(optimizer.param_groups[0]["fused"]) == fused
    torch.testing.assert_close(
        train(optimized, optimizer, 3), train(plain, plain_optimizer, 3, torch.float32), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.filterwarnings("ignore:.*(split master weights|no fused update)")
@pytest.mark.parametrize("name", [*OPTIMIZERS, *WITHOUT_FUSED])
def test_closures_schedulers_and_hooks(name, fuse, model):
    def run(model, optimizer, by_closure):
        scheduler = StepLR(optimizer, 1, gamma=0.5)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model)
            loss.backward()
            return loss

        for _ in range(3):
            if by_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
            scheduler.step()
        assert calls == ["pre", "post"] * 3
        assert optimizer.param_groups[0]["lr"] < 0.1 * 0.2
        return model.state_dict()

    results = []
    make = (OPTIMIZERS | WITHOUT_FUSED)[name]
    for by_closure in (False, True):
        pair = ipex.optimize(model, torch.bfloat16, make(model.parameters()), fuse_update_step=fuse)
        results.append(run(*pair, by_closure))
    same(*results)
    assert not torch.equal(results[0]["norm.weight"], model.norm.weight)
    assert not torch.equal(results[0]["head.weight"], model.head.weight)


@pytest.mark.filterwarnings("ignore:.*(split master weights|no fused update)")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_lbfgs(dtype, model):
    """An optimizer that has more than groups and state, and calls its closure several times a step."""
    optimized, optimizer = ipex.optimize(model, dtype, LBFGS(model.parameters(), lr=0.1, max_iter=4))
    assert optimizer._params[0] is optimized.embedding.weight
    pairs = ((optimized, optimizer), (model, LBFGS(model.parameters(), lr=0.1, max_iter=4)))
    losses = []
    for trained, stepping in pairs:

        def closure(trained=trained, stepping=stepping):
            stepping.zero_grad()
            loss = loss_of(trained, torch.bfloat16 if trained is optimized else torch.float32)
            loss.backward()
            return loss

        losses.append([stepping.step(closure).item() for _ in range(3)])
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0)
    assert losses[0][2] < 0.9 * losses[0][0]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scaler(dtype, fuse, model):
    """Training by a scaler is training without; a step with infinite gradients is skipped."""
    plain = copy.deepcopy(model)
    plain_optimizer = Adam(plain.parameters(), 0.01)
    optimized, optimizer = ipex.optimize(model, dtype, Adam(model.parameters(), 0.01), fuse_update_step=fuse)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for number in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(optimized, dtype)).backward()
        if number == 1:
            before = copy.deepcopy(optimized.state_dict())
            optimized.norm.weight.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if number == 1:
            same(optimized.state_dict(), before)
    assert scaler.get_scale() == 32.0
    train(plain, plain_optimizer, 2, torch.float32)
    torch.testing.assert_close(optimized.state_dict(), plain.state_dict(), rtol=0.05, atol=2e-3)


def test_groups(model):
    """Settings of groups count, and a group that comes later is updated like the others."""
    options = [{"params": [model.embedding.weight], "lr": 0.5}, {"params": model.norm.parameters(), "lr": 0.0}]
    optimized, optimizer = ipex.optimize(model, torch.bfloat16, SGD(options, 0.1))
    before = copy.deepcopy(optimized.state_dict())
    train(optimized, optimizer, 1)
    after = copy.deepcopy(optimized.state_dict())
    assert not torch.equal(after["embedding.weight"], before["embedding.weight"])
    same(after["norm.weight"], before["norm.weight"])
    same(after["frozen.weight"], before["frozen.weight"])
    optimized.frozen.requires_grad_()
    optimizer.add_param_group({"params": optimized.frozen.parameters()})
    assert optimizer.param_groups[2]["fused"]
    train(optimized, optimizer, 1)
    changed = optimized.state_dict()["frozen.weight"] - after["frozen.weight"]
    torch.testing.assert_close(changed, -0.1 * optimized.frozen.weight.grad.float(), rtol=1e-5, atol=1e-8)


def test_an_optimizer_without_fused_update_is_named_where_it_was_given(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimized, optimizer = ipex.optimize(model, torch.bfloat16, RMSprop(model.parameters(), 0.01))
    assert [str(each.message).partition(";")[0].partition(":")[0] for each in caught] == [
        "RMSprop cannot update split master weights",
        "fuse_update_step",
    ]
    assert all("RMSprop" in str(each.message) and each.filename == __file__ for each in caught)
    losses = train(optimized, optimizer, 3)
    plain_losses = train(model, RMSprop(model.parameters(), 0.01), 3, torch.float32)
    torch.testing.assert_close(losses, plain_losses, rtol=0.02, atol=0)


class Own(Adam):
    """A subclass may compute otherwise."""


def test_subclasses_and_sparse_gradients_are_named(model):
    with pytest.warns(UserWarning, match="Own") as caught:
        ipex.optimize(model, torch.bfloat16, Own(model.parameters()))
    assert {each.filename for each in caught} == {__file__}
    table = nn.Sequential(nn.Embedding(5, 4, sparse=True)).train()
    with pytest.warns(UserWarning, match="sparse gradients"):
        table, optimizer = ipex.optimize(table, torch.bfloat16, SGD(table.parameters(), 0.1))
    before = table[0].weight.detach().float()
    table(torch.tensor([1, 1])).float().sum().backward()
    optimizer.step()
    expected = torch.zeros(5, 4)
    expected[1] = -0.2
    torch.testing.assert_close(table[0].weight.detach().float() - before, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["Lamb", "Lars"])
def test_layerwise_optimizers_are_split_and_fused_without_warnings(name, model, recwarn):
    optimized, optimizer = ipex.optimize(model, torch.bfloat16, OPTIMIZERS[name](model.parameters()))
    assert optimizer.param_groups[0]["fused"]
    assert optimized.head.weight.dtype == torch.bfloat16
    assert not recwarn.list
