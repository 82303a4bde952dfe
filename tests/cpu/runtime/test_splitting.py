"""Splitting and joining, against numpy's `array_split` and against nested values put together by hand."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from ipex_quant.cpu.runtime.splitting import check_hint, join, shares, split

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    name: str = "record"
    size: int = dataclasses.field(default=3, init=False)


@given(st.integers(0, 70), st.integers(1, 20))
def test_shares_are_even_and_the_first_ones_take_the_rest(count, parts):
    expected = [part for part in np.array_split(np.arange(count), parts) if len(part)] or [np.arange(0)]
    assert [list(range(start, start + length)) for start, length in shares(count, parts)] == [
        part.tolist() for part in expected
    ]


@st.composite
def hinted(draw, rows):
    """A hint and a value of its form, nested at random, with `rows` rows along the dimensions of the hint."""

    def leaf():
        dims = draw(st.integers(1, 3))
        dim = draw(st.one_of(st.none(), st.integers(-dims, dims - 1)))
        shape = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
        if dim is not None:
            shape[dim] = rows
        return dim, torch.rand(shape)

    def node(depth):
        kind = (
            draw(st.sampled_from(["leaf", "constant", "tuple", "list", "dict", "pair", "output"])) if depth else "leaf"
        )
        if kind == "leaf":
            return leaf()
        if kind == "constant":
            return None, draw(st.sampled_from([None, True, 2.5, "text"]))
        count = 2 if kind == "pair" else 1 if kind == "output" else draw(st.integers(0, 3))
        hints, values = zip(*[node(depth - 1) for _ in range(count)], strict=True) if count else ((), ())
        if kind == "dict":
            return dict(zip("abc", hints, strict=False)), dict(zip("abc", values, strict=False))
        if kind == "output":
            value = values[0] if isinstance(values[0], torch.Tensor) else torch.rand(rows)
            return {"last_hidden_state": hints[0] if value is values[0] else 0}, BaseModelOutput(value)
        made = Pair(*values) if kind == "pair" else list(values) if kind == "list" else values
        return draw(st.sampled_from([list, tuple]))(hints), made

    hint, value = node(3)
    return (0, hint), (torch.rand(rows, 2), value)


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert_same(got[name], value)
    elif isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 9), st.integers(1, 6))
def test_joining_undoes_splitting(data, rows, streams):
    hint, value = data.draw(hinted(rows))
    parts = split(hint, value, streams, "arguments")
    assert len(parts) == max(1, min(rows, streams))
    sizes = [len(part) for part in np.array_split(np.arange(rows), streams)][: len(parts)]
    assert [len(part[0]) for part in parts] == sizes
    assert_same(join(hint, parts, "result"), value)


def test_containers_of_every_kind():
    x, y = torch.rand(4, 2), torch.rand(4)
    counts = defaultdict(int, x=x)
    values = [(x, y), [x, y], {"x": x}, OrderedDict(x=x), counts, Pair(x, y), Record(x), BaseModelOutput(x)]
    values.append(BatchEncoding({"x": x}))
    for value in values:
        hint = 0
        if isinstance(value, Record):
            hint = {"x": 0}
        first, second = split(hint, value, 2, "arguments")
        assert type(first) is type(second) is type(value)
        for half, part in ((x[:2], first), (x[2:], second)):
            tensor = (
                part.x
                if isinstance(part, Record)
                else next(iter(part.values()))
                if hasattr(part, "values")
                else part[0]
            )
            assert torch.equal(tensor, half)
        assert type(join(hint, [first, second], "result")) is type(value)
    assert split({"x": 0}, Record(x), 2, "arguments")[0].size == 3
    assert counts["x"] is x
    assert set(split(0, MappingProxyType({"x": x}), 2, "arguments")[0]) == {"x"}


def test_one_dimension_for_a_container_holds_for_all_tensors_in_it():
    x = torch.rand(2, 4)
    first, second = split(1, {"x": (x, [x]), "none": None}, 2, "arguments")
    assert first["x"][1][0].shape == (2, 2)
    assert second["none"] is None
    assert_same(join(1, [first, second], "result"), {"x": (x, [x]), "none": None})


def test_shares_are_views():
    x = torch.rand(4, 2)
    assert split(0, x, 2, "arguments")[1].data_ptr() == x[2:].data_ptr()
    assert join(0, [x], "result") is x


X = torch.rand(4, 2)


@pytest.mark.parametrize(
    ("hint", "value", "error", "message"),
    [
        ((0,), X, ValueError, r"arguments: the hint \(0,\) is for a container, got a tensor"),
        ({"x": {"y": 0}}, {"x": X}, ValueError, r"arguments\['x'\]: the hint \{'y': 0\} is for a container"),
        (2, X, ValueError, r"the hint says dimension 2, got a tensor of shape \[4, 2\]"),
        (0, torch.tensor(1.0), ValueError, r"got a tensor of shape \[\]"),
        ((0, 0), (X, X[:3]), ValueError, r"arguments\[0\] has 4, arguments\[1\] has 3; give None"),
        ((0, 0), (X,), ValueError, r"the hint \(0, 0\) does not have the form of a tuple of 1 items"),
        ({0: 0}, (X,), ValueError, "does not have the form of a tuple of 1 items"),
        ((0,), {"x": X}, ValueError, r"arguments: the hint \(0,\) is no dict, got dict"),
        ((0, 0), (X, True), TypeError, r"arguments\[1\]: the hint says dimension 0, got bool"),
        (0, (X, "text"), TypeError, r"arguments\[1\]: the hint says dimension 0, got str"),
        ({"x": 0}, {"x": X, "y": [{"z": X}]}, ValueError, r"arguments\['y'\]: the hint does not name it, and it holds"),
        (None, X, ValueError, "names no tensor to split"),
        ((0, None), (None, X), ValueError, "names no tensor to split"),
    ],
)
def test_values_that_do_not_fit(hint, value, error, message):
    with pytest.raises(error, match=message):
        split(hint, value, 2, "arguments")


@pytest.mark.parametrize(
    ("hint", "values", "message"),
    [
        (0, [X, X[:, :1]], r"result: the streams' results cannot be concatenated along dimension 0: .*concat_output"),
        (0, [X, None], r"result: the streams' results differ in type: \['NoneType', 'Tensor'\]"),
        (0, [(X,), (X, X)], "does not have the form of a tuple of 1 items"),
        (0, [{"x": X}, {"y": X}], "result: the streams' results differ in their names"),
        (1, [X[0], X[1]], "the hint says dimension 1"),
    ],
)
def test_results_that_cannot_be_joined(hint, values, message):
    with pytest.raises(ValueError, match=message):
        join(hint, values, "result")


def test_what_the_hint_does_not_name():
    first, second = split({"x": 0, "absent": 1}, {"x": X, "flag": True, "names": ["a"]}, 2, "arguments")
    assert first["flag"] is second["flag"] is True
    assert second["names"] == ["a"]


def test_hints():
    check_hint((0, None, {"x": [-1, (2,)]}), "hint")
    for wrong, where in ((0.5, "hint"), (True, "hint"), ({"x": ("0",)}, r"hint\['x'\]\[0\]"), ([{1}], r"hint\[0\]")):
        with pytest.raises(TypeError, match=f"{where}: expected None, a dimension"):
            check_hint(wrong, "hint")
