import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import ipex_quant as ipex


class Net(nn.Module):
    """All layers that `optimize` may change."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 16)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.up(torch.relu(self.bn(self.conv(x))))
        y = self.linear(self.dropout(y.mean(2).transpose(1, 2)))
        return self.head(self.lstm(torch.relu(y))[0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def close(actual, expected, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("level", ["O0", "O1"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_those_of_the_model(model, dtype, level, inplace):
    expected, before = model(X).detach(), copy.deepcopy(model.state_dict())
    optimized = ipex.optimize(model, dtype=dtype, level=level, inplace=inplace)
    assert type(optimized) is Net
    assert (optimized is model) is inplace
    assert isinstance(optimized.dropout, nn.Identity) is (level == "O1")
    assert isinstance(optimized.bn, nn.Identity) is (level == "O1")
    low = dtype in (torch.bfloat16, torch.float16)
    assert optimized.linear.weight.dtype == optimized.lstm.weight_ih_l0.dtype == (dtype if low else torch.float32)
    with torch.no_grad():
        close(optimized(X.to(dtype or torch.float32)), expected, dtype or torch.float32)
        if low:
            with torch.autocast("cpu", dtype):
                close(optimized(X), expected, dtype)
    if not inplace:
        close(model(X), expected)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for name, parameter in optimized.named_parameters():
            assert parameter.data_ptr() != model.get_parameter(name).data_ptr()


def test_optimizing_again_changes_nothing(model):
    expected = model(X).detach()
    for _ in range(3):
        model = ipex.optimize(model)
        with torch.no_grad():
            close(model(X), expected)


def test_parameters_are_ordinary_tensors_also_when_made_in_inference_mode(model):
    with torch.inference_mode():
        optimized = ipex.optimize(model, torch.bfloat16)
        optimized(X.bfloat16())
    assert not any(parameter.is_inference() for parameter in optimized.parameters())


def test_a_state_dict_loads_after_optimizing_and_into_the_plain_model(model):
    donor = Net().eval()
    donor.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
    options = {"conv_bn_folding": False}
    optimized = ipex.optimize(model, **options)
    with torch.no_grad():
        optimized(X)
        assert optimized.load_state_dict(donor.state_dict()) == ([], [])
        close(optimized(X), donor(X))
    low = ipex.optimize(model, torch.bfloat16, **options)
    assert low.state_dict().keys() == model.state_dict().keys()
    low.load_state_dict(donor.state_dict())
    model.load_state_dict(low.state_dict())
    with torch.no_grad():
        close(model(X), donor(X), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_pickles_and_files(model, dtype):
    optimized, x = ipex.optimize(model, dtype=dtype), X.to(dtype)
    file = io.BytesIO()
    with torch.no_grad():
        expected = optimized(x)
        torch.save(optimized, file)
        file.seek(0)
        copies = (
            copy.deepcopy(optimized),
            pickle.loads(pickle.dumps(optimized)),
            torch.load(file, weights_only=False),
        )
        for other in copies:
            assert torch.equal(other(x), expected)
            other.head.weight.zero_()
            other.head.bias.fill_(1)
            assert torch.equal(other(x), torch.ones_like(expected))
        assert torch.equal(optimized(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_evaluation_mode(model, dtype):
    expected, actual = X.clone().requires_grad_(), X.to(dtype, copy=True).requires_grad_()
    optimized = ipex.optimize(model, dtype=dtype)
    model(expected).sum().backward()
    optimized(actual).sum().backward()
    close(actual.grad, expected.grad, dtype)
    close(optimized.linear.weight.grad / 10, model.linear.weight.grad / 10, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traces_can_be_frozen_saved_and_loaded(model, dtype):
    optimized, x = ipex.optimize(model, dtype=dtype), X.to(dtype)
    file = io.BytesIO()
    with torch.no_grad():
        expected = optimized(x)
        traced = torch.jit.freeze(torch.jit.trace(optimized, x))
        torch.jit.save(traced, file)
        file.seek(0)
        for module in (traced, torch.jit.load(file)):
            close(module(x), expected.float(), dtype)


def test_compiled_models(model):
    optimized = ipex.optimize(model)
    with torch.no_grad():
        close(torch.compile(optimized, backend="aot_eager")(X), model(X))


def test_errors(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind, match="should be given for training mode"):
            ipex.optimize(model.train())
        with pytest.raises(kind, match="expected None for a model in evaluation mode"):
            ipex.optimize(model.eval(), optimizer=optimizer)
    with pytest.raises(RuntimeError, match="Unexpected optimization level O2"):
        ipex.optimize(model, level="O2")
    with pytest.raises(ValueError, match=r"dtype: expected .* got torch\.int8"):
        ipex.optimize(model, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got str"):
        ipex.optimize(nn.Linear(2, 2).train(), optimizer="SGD")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        ipex.optimize("model")


def test_scripted_models_are_returned_as_they_are(model):
    traced = torch.jit.trace(model, X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert ipex.optimize(traced) is traced
    assert ipex.optimize(traced, optimizer=optimizer) == (traced, optimizer)


def test_a_model_that_cannot_be_copied_is_changed_in_place(model):
    model.result = model.linear(torch.randn(2, 4))  # torch copies no tensor that has a history
    with pytest.warns(UserWarning, match="in place"):
        assert ipex.optimize(model) is model
    assert isinstance(model.dropout, nn.Identity)


BERT = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60)
IDS = torch.arange(24).view(2, 12)
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transformers_models_are_traced_with_gradients_on_or_off(grad):
    """`torch.jit.trace` checks its graph without gradients, and refuses one that it then finds another for."""
    model = BertModel(BERT).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(ipex.optimize(model), (IDS, MASK), strict=False)
    with torch.no_grad():
        expected = model(IDS, MASK).last_hidden_state
        torch.testing.assert_close(traced(IDS, MASK)["last_hidden_state"][MASK.bool()], expected[MASK.bool()])


@pytest.mark.parametrize("mask", [torch.ones_like(MASK), MASK])
@pytest.mark.parametrize("wrapped", [False, True])
def test_transformers_models_use_the_native_attention(mask, wrapped):
    model = BertModel(BERT).eval()
    optimized = ipex.optimize(nn.ModuleDict({"bert": model}).eval() if wrapped else model)
    bert = optimized["bert"] if wrapped else optimized
    assert bert.config._attn_implementation == "ipex_quant"
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        close(bert(IDS, mask).last_hidden_state[mask.bool()], model(IDS, mask).last_hidden_state[mask.bool()])
    assert ipex.optimize(model, level="O0").config._attn_implementation == "sdpa"


def test_a_pickled_model_brings_its_attention_to_a_process_that_has_not_loaded_it(tmp_path):
    optimized = ipex.optimize(BertModel(BERT).eval())
    with torch.no_grad():
        torch.save([optimized, optimized(IDS).last_hidden_state], tmp_path / "model.pt")
    code = (
        "import torch; model, expected = torch.load('model.pt', weights_only=False); "
        "ids = torch.arange(24).view(2, 12); torch.testing.assert_close(model(ids).last_hidden_state, expected)"
    )
    paths = os.pathsep.join([str(Path(ipex.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, check=True)
