import copy
import pickle

import pytest
import torch
import torch.ao.quantization as torch_ao
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from ipex_quant import observers
from ipex_quant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

KINDS = [MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver, HistogramObserver]
ARGUMENTS = [
    {},
    {"dtype": torch.qint8},
    {"reduce_range": True},
    {"quant_min": 0, "quant_max": 100},
    {"quant_min": -7, "quant_max": 7, "dtype": torch.qint8, "eps": 0.5},
]


def batches(count: int = 3, shape: tuple[int, ...] = (4, 5, 6)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * (i + 1) + 0.3 for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", ["MinMaxObserver", "MovingAverageMinMaxObserver", "PerChannelMinMaxObserver"])
@pytest.mark.filterwarnings("ignore:Please use quant_min")
def test_agrees_with_torch(name, arguments, symmetric, dtype):
    per_channel = "PerChannel" in name
    scheme = f"per_{'channel' if per_channel else 'tensor'}_{'symmetric' if symmetric else 'affine'}"
    if symmetric and arguments.get("reduce_range"):  # torch has it for qint8 alone
        arguments = arguments | {"dtype": torch.qint8}
    arguments = arguments | {"qscheme": getattr(torch, scheme)} | ({"ch_axis": -1} if per_channel else {})
    ours, theirs = getattr(observers, name)(**arguments), getattr(torch_ao, name)(**arguments)
    for x in batches():
        assert ours(x.to(dtype)) is not None
        theirs(x.to(dtype))
    scale, zero_point = ours.calculate_qparams()
    expected_scale, expected_zero_point = theirs.calculate_qparams()
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert torch.equal(ours.min_val, theirs.min_val)
    assert torch.equal(ours.max_val, theirs.max_val)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(zero_point, expected_zero_point.int())


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_per_channel_along_every_axis(axis):
    observer = PerChannelMinMaxObserver(axis)
    x = torch.stack(batches())
    for part in batches():
        observer(part)
    rest = [dim for dim in range(4) if dim != (axis + 1 if axis >= 0 else axis + 4)]
    assert torch.equal(observer.min_val, x.amin(rest))
    assert torch.equal(observer.max_val, x.amax(rest))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_change_nothing(kind):
    observer = kind()
    observer(torch.empty(0, 4))
    assert not observer.has_data
    with pytest.raises(RuntimeError, match=f"{kind.__name__} has seen no data"):
        observer.calculate_qparams()
    observer(torch.ones(4, 2))
    state = {name: value.clone() for name, value in observer.state_dict().items()}
    observer(torch.empty(4, 0))
    assert observer.has_data
    assert all(torch.equal(value, state[name]) for name, value in observer.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_values_are_refused_and_leave_no_trace(kind, value):
    observer, untouched = kind(), kind()
    bad = torch.ones(4, 3)
    bad[2, 1] = value
    with pytest.raises(ValueError, match="expected finite values, got NaN or Inf"):
        observer(bad)
    for each in (observer, untouched):
        each(torch.ones(4, 3))
    with pytest.raises(ValueError, match="expected finite values, got NaN or Inf"):
        observer(bad)
    assert_equal_states(observer, untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_saving_copying_and_casting(kind):
    observer = kind()
    for x in batches():
        observer(x)
    loaded = kind()
    loaded.load_state_dict(observer.state_dict())
    for other in (loaded, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer)), observer.to(torch.bfloat16)):
        assert_equal_states(other, observer)
        assert other.min_val.dtype == torch.float32
    observer.reset()
    assert not observer.has_data


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_after_inference_mode(kind):
    observer, expected = kind(), kind()
    with torch.inference_mode():
        observer(batches()[0])
    observer(batches()[1])
    expected(batches()[0])
    expected(batches()[1])
    assert_equal_states(observer, expected)
    observer.load_state_dict(expected.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_no_activation_and_no_graph(kind):
    observer = kind()
    x = torch.randn(64, 32, requires_grad=True) * 2
    assert observer(x) is x
    held = sum(value.numel() for value in observer.state_dict().values())
    observer(torch.randn(64, 320)[:, :32].requires_grad_())
    assert sum(value.numel() for value in observer.state_dict().values()) == held
    assert not any(value.requires_grad for value in observer.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_factories_chain_pickle_and_copy(kind):
    factory = kind.with_args(dtype=torch.qint8).with_args(eps=0.25)
    for each in (factory, pickle.loads(pickle.dumps(factory)), copy.deepcopy(factory)):
        first, second = each(), each()
        assert first is not second
        assert (type(first), first.dtype, first.eps) == (kind, torch.qint8, 0.25)
    assert factory.with_args(dtype=torch.quint8)().dtype == torch.quint8


def test_minus_zero_leaves_no_trace():
    one, other = MinMaxObserver(), MinMaxObserver()
    for observer, values in ((one, (0.0, -0.0)), (other, (-0.0, 0.0))):
        for value in values:
            observer(torch.tensor([value]))
    assert one.min_val.view(torch.int32) == other.min_val.view(torch.int32) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinMaxObserver(dtype=torch.float32), "quint8 or torch.qint8, got torch.float32"),
        (lambda: MinMaxObserver(qscheme=torch.per_channel_affine), "qscheme: expected torch.per_tensor_affine"),
        (lambda: PerChannelMinMaxObserver(qscheme=torch.per_tensor_affine), "expected torch.per_channel_affine"),
        (lambda: MinMaxObserver(quant_min=3, quant_max=9), "quant_min <= 0 < quant_max"),
        (lambda: MinMaxObserver(quant_min=-300, quant_max=9), "at most 256 levels"),
        (lambda: HistogramObserver(bins=1), "bins: expected an integer in 2..16384, got 1"),
        (lambda: HistogramObserver(bins=1 << 15), "bins"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs():
    observer = PerChannelMinMaxObserver(ch_axis=2)
    with pytest.raises(ValueError, match=r"an axis 2, got shape \[3, 4\]"):
        observer(torch.ones(3, 4))
    observer(torch.ones(1, 1, 5))
    with pytest.raises(ValueError, match=r"expected 5 channels along axis 2, got shape \[1, 1, 6\]"):
        observer(torch.ones(1, 1, 6))
    with pytest.raises(TypeError, match=r"expected a float tensor, got torch.int64"):
        observer(torch.ones(1, 1, 5, dtype=torch.int64))


def test_observe_checks_what_torch_does_not():
    observer = torch_ao.MinMaxObserver()
    observers.observe(observer, torch.empty(0))
    assert not observers.has_data(observer)
    with pytest.raises(ValueError, match="expected finite values"):
        observers.observe(observer, torch.tensor([1.0, torch.nan]))
    assert not observers.has_data(observer)
    observers.observe(observer, torch.tensor([1.0, 2.0]))
    assert observers.has_data(observer)
    assert not observers.has_data(torch_ao.PlaceholderObserver(dtype=torch.float))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), st.booleans())
@example([1e-5], False)  # torch's default floor of scales is above this one; ours is for ranges of zeros alone
def test_any_range_agrees_with_torch(values, symmetric):
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    info = torch.finfo(torch.float32)
    floor = info.tiny if any(values) else info.eps
    ours, theirs = MinMaxObserver(qscheme=qscheme), torch_ao.MinMaxObserver(qscheme=qscheme, eps=floor)
    for observer in (ours, theirs):
        observer(torch.tensor(values))
    for value, expected in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert torch.equal(value, expected.to(value.dtype))


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
