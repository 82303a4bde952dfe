import copy

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.frontend.graph_mode import CompiledForward
from ipex_quant.nn import prepacked
from ipex_quant.nn.prepacked import Prepacked


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(8, 5), nn.Dropout(0.0)).train()


X = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(1))


def step(model, optimizer, dtype=torch.float32):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(X).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("level", ["O0", "O1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_the_plain_model(model, dtype, level, inplace):
    plain = copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    optimized, updated = ipex.optimize(model, dtype, optimizer, level=level, inplace=inplace)
    assert type(optimized) is nn.Sequential
    assert (optimized is model) is inplace
    assert isinstance(optimized[1], nn.BatchNorm1d)
    assert optimized[3].weight.dtype == dtype
    assert optimized[1].weight.dtype == torch.float32
    for _ in range(3):
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(
            step(optimized, updated, dtype), step(plain, plain_optimizer), rtol=tolerance, atol=0
        )
    state = optimized.state_dict()
    assert {value.dtype for name, value in state.items() if "num_batches" not in name} == {torch.float32}
    plain.load_state_dict(state)
    if not inplace:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_optimizing_again(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for _ in range(3):
        model, optimizer = ipex.optimize(model, torch.bfloat16, optimizer)
        losses.append(step(model, optimizer, torch.bfloat16))
    assert losses == sorted(losses, reverse=True)
    inference = ipex.optimize(model.eval(), torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(inference(X.bfloat16()).float(), model.float()(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("slow", [frozenset(), frozenset((torch.bfloat16,))])
def test_layers_compute_in_another_dtype_only_on_cpus_that_need_it(monkeypatch, model, slow):
    monkeypatch.setattr(prepacked, "_SLOW", slow)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimized, _ = ipex.optimize(model, torch.bfloat16, optimizer)
    assert isinstance(vars(optimized[3]).get("forward"), Prepacked) == bool(slow)
    optimized, _ = ipex.optimize(model, torch.float32, optimizer)
    assert "forward" not in vars(optimized[3])


def test_graph_mode(model):
    optimized, _ = ipex.optimize(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), graph_mode=True)
    assert isinstance(optimized.forward, CompiledForward)
