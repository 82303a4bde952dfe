import math

import pytest

from ipex_quant.autotune.budget import Budget, parse_size
from ipex_quant.autotune.fit import MonotoneFit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("120MB", 120_000_000),
        ("1.5 GiB", 3 << 29),
        ("2kb", 2000),
        ("4096", 4096),
        (4096, 4096),
        ("0.5KiB", 512),
    ],
)
def test_sizes_as_users_say_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "12 parsecs", "-5MB", "0", "1e9", "1" * 40, "0.0001B", None])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size: expected"):
        parse_size(text)


def test_limits_are_numbers_above_0():
    for name in ("size", "max_kl", "tokens_per_second", "max_bytes_per_weight"):
        for value in (0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name}: expected a number above 0"):
                Budget(**{name: value})
        with pytest.raises(TypeError, match=f"{name}: expected a number above 0, got '1'"):
            Budget(**{name: "1"})
    assert not Budget().any
    assert Budget(size=1).without_accuracy
    assert not Budget(size=1, max_kl=1.0).without_accuracy
    assert not Budget(max_bytes_per_weight=1.0).without_accuracy


def test_a_fit_goes_through_its_points():
    fit = MonotoneFit()
    assert fit(0.3) == 0.3
    fit.add(0.1, 0.2)
    assert fit(0.1) == pytest.approx(0.2)
    assert fit(0.01) == pytest.approx(0.02), "proportional"
    fit.add(0.4, 3.2)
    assert fit(0.2) == pytest.approx(0.8), "straight in logarithms"
    assert fit(0.8) == pytest.approx(6.4)
    assert fit(0.05) == pytest.approx(0.1)


def test_a_fit_never_falls():
    fit = MonotoneFit()
    for estimate, measured in ((1.0, 1.0), (2.0, 4.0), (3.0, 1.0), (4.0, 8.0)):
        fit.add(estimate, measured)
    values = [fit(0.5 + 0.1 * i) for i in range(50)]
    assert values == sorted(values)
    assert fit(2.0) == fit(3.0) == pytest.approx(2.0)


def test_what_has_no_logarithm_says_nothing():
    fit = MonotoneFit()
    for estimate, measured in ((0.0, 1.0), (1.0, 0.0), (1.0, -0.5), (math.nan, 1.0), (1.0, math.inf)):
        fit.add(estimate, measured)
    assert fit(0.7) == 0.7
    assert fit(0.0) == 0.0
