"""What the user's arguments mean: criterion, op_type_dict, smoothquant_args and batches."""

import pytest
import torch
from torch import nn

from ipex_quant.autotune.agreement import agreement
from ipex_quant.autotune.batches import read_batches
from ipex_quant.autotune.constraints import float_layers
from ipex_quant.autotune.criterion import Criterion
from ipex_quant.autotune.smoothquant_args import read_smoothquant_args
from ipex_quant.autotune.static import AlphaSearch

FP32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}


def test_losses():
    relative, absolute = Criterion.of({"relative": 0.1}), Criterion.of({"absolute": 2})
    assert relative == Criterion(True, 0.1)
    assert Criterion.of(None) == Criterion(True, 0.01)
    assert relative.loss(50.0, 45.0) == pytest.approx(0.1)
    assert relative.loss(-50.0, -55.0) == pytest.approx(0.1), "of a negative metric as well, less is worse"
    assert absolute.loss(-50.0, -51.5) == 1.5
    assert absolute.met(2)
    assert not absolute.met(2.1)
    assert absolute.met(-5)


@pytest.fixture
def model():
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.query, model.attention.key = nn.Linear(2, 2), nn.Linear(2, 2)
    model.head, model.stem = nn.Linear(2, 2), nn.Conv2d(1, 1, 1)
    return model


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("Linear", {"attention.query", "attention.key", "head"}),
        ("linear", {"attention.query", "attention.key", "head"}),
        ("conv2d", {"stem"}),
        ("head", {"head"}),
        (r"attention\..*", {"attention.query", "attention.key"}),
        ("matmul", set()),
        ("LSTM", set()),
    ],
)
def test_op_type_dict(model, key, expected):
    assert float_layers(model, {key: FP32}) == expected
    assert float_layers(model, {key: {"weight": {"dtype": ["bf16"]}}}) == expected
    assert float_layers(model, {key: {"weight": {"dtype": ["int8", "fp32"]}}}) == set()
    assert float_layers(model, {key: {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["int8"]}}}) == expected
    assert float_layers(model, None) == set()


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ([], TypeError, "expected a dict of operator types"),
        ({3: FP32}, TypeError, "expected names"),
        ({"body": FP32}, ValueError, "'body' is no known operator type"),
        ({"he[ad": FP32}, ValueError, "no regular expression"),
        ({"head": {}}, ValueError, "head: expected"),
        ({"head": {"weight": {"dtype": "fp32"}}}, ValueError, "only dtype can be constrained"),
        ({"head": {"weight": {"granularity": ["per_tensor"]}}}, ValueError, "only dtype can be constrained"),
        ({"head": {"weight": {"dtype": ["int3"]}}}, ValueError, "expected dtypes of"),
    ],
)
def test_a_bad_op_type_dict(model, value, error, match):
    with pytest.raises(error, match=f"op_type_dict: .*{match}"):
        float_layers(model, value)


def test_smoothquant_args():
    assert read_smoothquant_args(None)[0] == ("auto", None)
    assert read_smoothquant_args({})[0] == ("auto",)
    assert read_smoothquant_args({"alpha": 0.3, "folding": True})[0] == (0.3,)
    assert read_smoothquant_args({"alpha": [0.3, "auto", 0.3, None, 1]})[0] == (0.3, "auto", None, 1.0)
    args = {
        "init_alpha": 0.8,
        "alpha_min": 0.8,
        "alpha_max": 0.99,
        "alpha_step": 0.05,
        "shared_criterion": "max",
        "enable_blockwise_loss": True,
    }
    expected = AlphaSearch((0.8, 0.85, 0.9, 0.95), "max", True, 0.8)
    assert read_smoothquant_args({"auto_alpha_args": args})[1] == expected
    args["do_blockwise"] = args.pop("enable_blockwise_loss")
    assert read_smoothquant_args({"alpha": "auto", "auto_alpha_args": args})[1] == expected
    assert len(AlphaSearch().alphas) == 11


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (0.5, TypeError, "smoothquant_args: expected a dict"),
        ({"alpa": 0.5}, ValueError, "unknown keys"),
        ({"alpha": 1.5}, ValueError, "alpha: expected"),
        ({"alpha": "automatic"}, TypeError, "alpha: expected"),
        ({"alpha": []}, ValueError, "at least one value"),
        ({"auto_alpha_args": 3}, TypeError, "auto_alpha_args: expected a dict"),
        ({"auto_alpha_args": {"step": 0.1}}, ValueError, "unknown keys"),
        ({"auto_alpha_args": {"alpha_step": 0}}, ValueError, "alpha_step"),
        ({"auto_alpha_args": {"alpha_min": 0.5, "alpha_max": 0.4}}, ValueError, "alpha_min <= alpha_max"),
        ({"auto_alpha_args": {"shared_criterion": "median"}}, ValueError, "shared_criterion"),
        ({"auto_alpha_args": {"enable_blockwise_loss": 1}}, TypeError, "enable_blockwise_loss"),
    ],
)
def test_bad_smoothquant_args(value, error, match):
    with pytest.raises(error, match=match):
        read_smoothquant_args(value)


class TwoInputs(nn.Module):
    def forward(self, x, lengths):
        return x * lengths[:, None]


def test_what_is_beside_the_arguments_is_left_out():
    x, lengths = torch.ones(3, 4), torch.tensor([1, 2, 3])
    one, two = nn.Linear(4, 4), TwoInputs()
    assert len(read_batches(one, [(x, lengths)], 1)[0].args) == 1
    assert len(read_batches(two, [(x, lengths)], 1)[0].args) == 2
    assert len(read_batches(two, [((x, lengths), torch.tensor([3]))], 1)[0].args) == 2
    assert read_batches(two, [({"x": x, "lengths": lengths}, 3)], 1)[0].kwargs.keys() == {"x", "lengths"}
    assert len(read_batches(nn.Bilinear(4, 4, 2), [(x, x)], 1)[0].args) == 2


def test_no_more_batches_are_read_than_are_needed():
    def batches():
        for _ in range(3):
            yield torch.ones(2, 4)
        raise AssertionError("one batch too many")

    found = read_batches(nn.Linear(4, 4), batches(), 5)
    assert [batch.sample_count for batch in found] == [2, 2, 2]


def test_agreement_of_outputs():
    torch.manual_seed(0)
    reference, x = nn.Linear(4, 4), torch.randn(8, 4)
    other = nn.Linear(4, 4)
    measure = agreement(reference, read_batches(reference, [x], 8))
    assert measure(reference) == 1
    expected = 1 - ((other(x) - reference(x)).square().sum() / reference(x).square().sum()).item()
    assert measure(other) == pytest.approx(expected)
    with pytest.raises(TypeError, match="returns no float tensor"):
        agreement(nn.Identity(), read_batches(reference, [torch.ones(2, dtype=torch.long)], 1))(nn.Identity())
