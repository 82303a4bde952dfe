import itertools
import math

import pytest
import torch
import torch.ao.quantization as torch_ao
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.observers import HistogramObserver, MinMaxObserver
from ipex_quant.observers.histogram import smallest_exponent
from ipex_quant.observers.range_search import Histogram


def squared_error(observer, x: torch.Tensor) -> float:
    """Error of quantizing `x` with the observer's parameters, value by value."""
    scale, zero_point = observer.calculate_qparams()
    codes = (torch.round(x / scale) + zero_point).clamp(observer.quant_min, observer.quant_max)
    return ((codes - zero_point) * scale - x).double().square().sum().item()


def seen(observer, parts):
    for part in parts:
        observer(part)
    return observer


def two_valued(low: float, high: float) -> torch.Tensor:
    return torch.where(torch.arange(20000) % 3 == 0, low, high)


def distributions() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(100_000)
    return {
        "normal": normal,
        "shifted": normal + 5,
        "student_t3": torch.distributions.StudentT(3.0).sample((100_000,)),
        "student_t2": torch.distributions.StudentT(2.0).sample((100_000,)),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((100_000,)),
        "outlier": torch.cat([normal, torch.tensor([100.0])]),
        "relu": normal.relu(),
        "negative": -normal.relu(),
        "gelu": torch.nn.functional.gelu(2 * normal),
        "uniform": torch.rand(100_000),
        "clamped": normal.clamp(-1, 1),
        "constant": torch.full((1000,), 0.3),
        "negative_constant": torch.full((1000,), -7.1),
        "power_of_two": torch.full((1000,), 4.0),
        "zero": torch.zeros(1000),
        "two_positive": two_valued(0.3, 0.7),
        "two_signs": two_valued(-1.3, 2.4),
        "binary": two_valued(0.0, 1.0),
    }


@pytest.mark.parametrize("name", distributions())
def test_error_is_at_most_torchs_and_min_maxs(name):
    x = distributions()[name]
    error = squared_error(seen(HistogramObserver(), x.chunk(4)), x)
    assert error <= 1.02 * squared_error(seen(torch_ao.HistogramObserver(), x.chunk(4)), x)
    assert error <= 1.005 * squared_error(seen(MinMaxObserver(), x.chunk(4)), x)


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
def test_range_is_about_the_best_there_is(dtype, qscheme):
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((20_000,))
    observer = seen(HistogramObserver(dtype=dtype, qscheme=qscheme), [x])
    plain = MinMaxObserver(dtype=dtype, qscheme=qscheme)
    errors = []
    for low, high in itertools.product(torch.linspace(0.05, 1, 40), torch.linspace(0.05, 1, 40)):
        plain.min_val, plain.max_val = x.min() * low, x.max() * high
        errors.append(squared_error(plain, x))
    assert squared_error(observer, x) <= 1.02 * min(errors)


def test_expected_error_is_that_of_the_values():
    """With so many values the histogram's expectation is the true error of quantizing them."""
    torch.manual_seed(0)
    x = torch.randn(1_000_000)
    observer = seen(HistogramObserver(bins=4096), [x])
    low, high = observer.best_range()
    plain = MinMaxObserver()
    for share in (1.0, 0.8, 0.5):
        plain.min_val, plain.max_val = low[0] * share, high[0] * share
        scale, zero_point = plain.calculate_qparams()
        expected = observer_histogram(observer).squared_error(scale, 0 - zero_point, 255 - zero_point)
        assert expected.item() == pytest.approx(squared_error(plain, x), rel=0.01)


def observer_histogram(observer):
    used = observer.histogram.nonzero().flatten()
    bounds = float(observer.min_val), float(observer.max_val)
    return Histogram.of(used - observer.bins + 1, observer.histogram[used], observer.exponent, *bounds)


values = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-2, 2, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1.0, -1.0, 1024.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=30), st.sampled_from([2, 3, 16, 2048]), st.randoms())
def test_state_depends_on_the_values_alone(numbers, bins, random):
    x = torch.tensor(numbers)
    expected = seen(HistogramObserver(bins), [x])
    shuffled = random.sample(numbers, len(numbers))
    cut = random.randint(0, len(numbers))
    for parts in (shuffled[:cut], shuffled[cut:]), [[number] for number in shuffled]:
        observer = seen(HistogramObserver(bins), [torch.tensor(part) for part in parts])
        for name, value in observer.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=30), st.sampled_from([2, 3, 16, 2048]))
def test_counts_are_those_of_exact_arithmetic(numbers, bins):
    observer = seen(HistogramObserver(bins), [torch.tensor(numbers)])
    expected = [0] * (2 * bins - 1)
    for number in torch.tensor(numbers).tolist():
        expected[int(math.ldexp(number, -observer.exponent)) + bins - 1] += 1  # ldexp and int: exact, truncating
    assert observer.histogram.tolist() == expected
    assert observer.histogram.count_nonzero() <= bins


@settings(max_examples=300, deadline=None)
@given(values, values, st.sampled_from([2, 3, 16, 2048, 16384]))
def test_exponent_is_the_smallest_that_fits(one, other, bins):
    low, high = min(one, other, 0.0), max(one, other, 0.0)

    def bins_needed(exponent: int) -> int:
        return int(math.ldexp(high, -exponent)) - int(math.ldexp(low, -exponent)) + 1

    exponent = smallest_exponent(one, other, bins) if one <= other else smallest_exponent(other, one, bins)
    assert bins_needed(exponent) <= bins
    assert exponent == -120 or bins_needed(exponent - 1) > bins


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_as_float32(dtype):
    x = torch.randn(4, 1000).to(dtype)
    half, full = seen(HistogramObserver(), [x]), seen(HistogramObserver(), [x.float()])
    assert torch.equal(half.histogram, full.histogram)
    assert half.histogram.sum() == x.numel()


def test_parameters_are_deterministic():
    x = torch.distributions.StudentT(2.0).sample((5000,))
    first = seen(HistogramObserver(), [x]).calculate_qparams()
    second = seen(HistogramObserver(), x.flip(0).chunk(7)).calculate_qparams()
    assert [*map(torch.equal, first, second)] == [True, True]
