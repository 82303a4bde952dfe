import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.autotune.allocation import Option, allocate

options = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10, width=16)), min_size=1, max_size=4).map(
    lambda entries: [Option(None, size, error) for size, error in entries]
)


@settings(max_examples=200, deadline=None)
@given(groups=st.lists(options, min_size=1, max_size=4), budget=st.integers(1, 120))
def test_the_choice_fits_and_is_close_to_the_best(groups, budget):
    named = {str(i): choices for i, choices in enumerate(groups)}
    fitting = [c for c in itertools.product(*groups) if sum(o.bytes for o in c) <= budget]
    chosen = allocate(named, budget)
    if not fitting:
        assert chosen is None
        return
    assert sum(option.bytes for option in chosen.values()) <= budget
    best = min(sum(option.error for option in choice) for choice in fitting)
    error = sum(option.error for option in chosen.values())
    # Greedy along convex hulls is off by less than what one step of one group gains.
    largest = max(max(o.error for o in choices) - min(o.error for o in choices) for choices in groups)
    assert best - 1e-9 <= error <= best + largest + 1e-9


def test_the_steps_that_gain_most_per_byte_come_first():
    named = {
        "sensitive": [Option(None, 4, 8.0), Option(None, 5, 1.0), Option(None, 9, 0.0)],
        "robust": [Option(None, 4, 0.5), Option(None, 9, 0.1)],
    }
    chosen = allocate(named, 10)
    assert {name: (option.bytes, option.error) for name, option in chosen.items()} == {
        "sensitive": (5, 1.0),
        "robust": (4, 0.5),
    }
    assert allocate(named, 7.9) is None
    assert sum(option.error for option in allocate(named, 1000).values()) == pytest.approx(0.1)
