"""Convolutions and scans in this process against their plain-torch definition; test_isa.py runs this at every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_mamba as reference

_ops = torch.ops.ipex_quant
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the dtype, and a second one where the sums in float32 fall to its other side.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 2.0**-23}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The values of `tensor` with other strides."""
    if kind == 1 and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 2:
        return torch.stack((tensor, tensor), -1)[..., 1]
    return tensor


def close(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor) -> None:
    """`size` is what the sums would be if nothing cancelled: errors of float32 are relative to that."""
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    bound = 2e-5 * size.double() + RTOL[got.dtype] * wanted.double().abs() + ATOL[got.dtype]
    error = (got.double() - wanted.double()).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


# ------------------------------------------------------------------------------------------------------- convolutions
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 5, 64, 65, 131]), st.sampled_from([0, 1, 2, 7, 33, 100])),
    width=st.sampled_from([1, 2, 3, 4, 9, 40]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    strides=st.tuples(*[st.integers(0, 2)] * 3),
    bias=st.booleans(),
    before=st.booleans(),
    silu=st.booleans(),
)
def test_causal_conv1d(shape, width, dtypes, strides, bias, before, silu) -> None:
    batch, channels, _ = shape
    x = strided(draw(*shape, dtype=dtypes[0]), strides[0])
    weight = strided(draw(channels, width, dtype=dtypes[1], seed=1), strides[1])
    bias = draw(channels, dtype=dtypes[1], seed=2) if bias else None
    before = strided(draw(batch, channels, width - 1, dtype=dtypes[2], seed=3), strides[2]) if before else None
    got = ops.causal_conv1d(x, weight, bias, before, silu)
    assert got.is_contiguous()
    sizes = [None if each is None else each.abs() for each in (x.float(), weight, bias, before)]
    close(got, reference.causal_conv1d(x, weight, bias, before, silu), reference.causal_conv1d(*sizes, False))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 64, 65]), st.sampled_from([0, 1, 2, 7, 40])),
    width=st.sampled_from([1, 2, 4, 9]),
    more=st.sampled_from([0, 1, 5]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    strides=st.tuples(*[st.integers(0, 2)] * 2),
    starts=st.sampled_from([None, 0, 3, 1000, 2**62, -7]),
    silu=st.booleans(),
)
def test_causal_conv1d_update(shape, width, more, dtypes, strides, starts, silu) -> None:
    batch, channels, _ = shape
    x, weight = strided(draw(*shape, dtype=dtypes[0]), strides[0]), draw(channels, width, dtype=dtypes[1], seed=1)
    bias = draw(channels, dtype=dtypes[1], seed=2)
    states = [strided(draw(batch, channels, width - 1 + more, dtype=dtypes[2], seed=3), strides[1]) for _ in range(2)]
    starts = None if starts is None else torch.arange(batch) + starts
    sizes = [each.abs() for each in (x.float(), states[0], weight, bias)]
    got = ops.causal_conv1d_update(x, states[0], weight, bias, starts, silu)
    wanted = reference.causal_conv1d_update(x, states[1], weight, bias, starts, silu)
    close(got, wanted, reference.causal_conv1d_update(*sizes, starts, False))
    assert torch.equal(*states)


# -------------------------------------------------------------------------------------------------------------- scans
class Scan:
    """The arguments of a scan whose states decay: steps are positive, rates negative."""

    def __init__(self, shape, states, groups, dtypes=(torch.float32,) * 3, kinds=(0, 0, 0), parts=(True,) * 3):
        batch, heads, features, length = shape
        activations, weights, state = dtypes
        self.u, z = (strided(draw(*shape, dtype=activations, seed=seed), kinds[0]) for seed in (0, 1))
        self.delta = strided(draw(*shape, dtype=activations, seed=2).abs() / 2, kinds[1])
        self.a = strided(-draw(heads, features, states, dtype=weights, seed=3).abs(), kinds[1])
        self.factors = [
            strided(draw(batch, groups, states, length, dtype=activations, seed=seed), kinds[2]) for seed in (4, 5)
        ]
        d, bias = (draw(heads, features, dtype=weights, seed=seed) for seed in (6, 7))
        bias = bias.abs()
        self.rest = [each if given else None for each, given in zip((d, z, bias), parts, strict=True)]
        self.state = strided(draw(batch, heads, features, states, dtype=state, seed=8), kinds[1])

    def check(self, softplus: bool) -> None:
        state = self.state.clone()
        wanted, last = reference.selective_scan(
            self.u, self.delta, self.a, *self.factors, *self.rest, softplus, self.state
        )
        size, last_size = self.sizes(softplus)
        got = ops.selective_scan(self.u, self.delta, self.a, *self.factors, *self.rest, softplus, self.state)
        assert got.is_contiguous()
        close(got, wanted, size)
        close(self.state, last.to(state.dtype), last_size)

    def sizes(self, softplus: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and last state of the absolute values, of which nothing cancels."""
        d, z, bias = self.rest
        delta = self.delta.float() if bias is None else self.delta.float() + bias.float()[..., None]
        delta = torch.nn.functional.softplus(delta) if softplus else delta
        u, factors = self.u.float().abs(), [each.float().abs() for each in self.factors]
        heads, h = self.u.shape[1], self.state.float().abs()
        sums = [u.new_zeros(*u.shape[:3], 0)]
        for i in range(u.shape[3]):
            b, c = (each[..., i].repeat_interleave(heads // each.shape[1], 1)[:, :, None] for each in factors)
            step = delta[..., i, None]
            h = torch.exp(step * self.a.float()) * h + step * u[..., i, None] * b
            sums.append((h * c).sum(-1, keepdim=True))
        total = torch.cat(sums, -1)
        if d is not None:
            total = total + d.float().abs()[..., None] * u
        return total if z is None else total * z.float().abs(), h


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 2),
        st.sampled_from([1, 2, 4, 6]),
        st.sampled_from([0, 1, 3, 64, 130]),
        st.sampled_from([0, 1, 2, 31, 32, 40, 70]),
    ),
    states=st.sampled_from([0, 1, 5, 8, 16, 20, 33]),
    groups=st.sampled_from([1, 2]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    kinds=st.tuples(*[st.integers(0, 2)] * 3),
    parts=st.tuples(*[st.booleans()] * 3),
    softplus=st.booleans(),
)
def test_selective_scan(shape, states, groups, dtypes, kinds, parts, softplus) -> None:
    Scan(shape, states, groups if shape[1] % groups == 0 else 1, dtypes, kinds, parts).check(softplus)


def test_one_rate_for_all_states_of_a_head() -> None:
    scan = Scan((2, 3, 8, 20), 24, 1)
    rates = -torch.rand(3, generator=torch.Generator().manual_seed(0))
    state = scan.state.clone()
    results = []
    for a in (rates[:, None, None].expand(3, 8, 24), rates[:, None, None].expand(3, 8, 24).contiguous()):
        own = state.clone()
        results.append((ops.selective_scan(scan.u, scan.delta, a, *scan.factors, *scan.rest, True, own), own))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    scan.a = rates[:, None, None].expand(3, 8, 24)
    scan.check(True)


def test_result_depends_neither_on_the_threads_nor_on_the_other_channels() -> None:
    scan = Scan((2, 2, 200, 50), 16, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            state = scan.state.clone()
            result = ops.selective_scan(scan.u, scan.delta, scan.a, *scan.factors, *scan.rest, True, state)
            results.append((result, state))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    d, z, bias = scan.rest
    some = slice(70, 75)
    part = [each[:, 1:, some] for each in (scan.u, scan.delta)]
    state = scan.state[:, 1:, some].clone()
    rest = d[1:, some], z[:, 1:, some], bias[1:, some]
    got = ops.selective_scan(*part, scan.a[1:, some], *scan.factors, *rest, True, state)
    assert torch.equal(got, results[0][0][:, 1:, some])
    assert torch.equal(state, results[0][1][:, 1:, some])


def test_softplus_at_the_ends() -> None:
    delta = torch.tensor([-200.0, -87.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 200.0, torch.inf, torch.nan])
    ones = torch.ones(1, 1, 1, 1)
    u = torch.ones(1, 10, 1, 1)
    # a state of nothing and a rate of 0: the result is delta
    got = ops.selective_scan(
        u, delta.view_as(u), torch.zeros(10, 1, 1), ones, ones, None, None, None, True, torch.zeros(1, 10, 1, 1)
    ).flatten()
    wanted = torch.nn.functional.softplus(delta.double()).float()
    torch.testing.assert_close(got[:8], wanted[:8], rtol=1e-6, atol=1e-37)
    assert got[9].isnan()


@pytest.mark.parametrize("states", [1, 5, 16])
def test_infinity_stays_infinite_and_in_its_channel(states) -> None:
    scan = Scan((1, 1, 9, 6), states, 1)
    scan.factors[1] = scan.factors[0] = scan.factors[0].abs()
    scan.u[0, 0, 4, 2] = torch.inf
    got = ops.selective_scan(scan.u, scan.delta, scan.a, *scan.factors, None, None, None, False, scan.state)
    assert got[0, 0, 4, 2:].eq(torch.inf).all()
    assert got.isinf().sum() == 4
    assert not got.isnan().any()


# -------------------------------------------------------------------------------------------------------------- calls
X, W, STATE = draw(2, 5, 6), draw(5, 4), draw(2, 5, 3)
U, A, B, H = draw(2, 4, 3, 6), draw(4, 3, 8), draw(2, 2, 8, 6), draw(2, 4, 3, 8)
SCAN = {"u": U, "delta": U, "a": A, "b": B, "c": B, "d": None, "z": U, "delta_bias": A[..., 0], "softplus": True}
SCAN |= {"state": H}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x: expected shape \[B, D, L\]"),
        ({"x": X.double()}, "x: expected float32, bfloat16 or float16"),
        ({"weight": W[:4]}, r"weight: expected shape \[5, W\] with W in 1..65536, got \[4, 4\]"),
        ({"weight": W[:, :0]}, r"weight: expected shape \[5, W\]"),
        ({"weight": W.long()}, "weight: expected float32"),
        ({"bias": W[0]}, r"bias: expected shape \[D\]"),
        ({"state": STATE[..., :2]}, r"state: expected shape \[2, 5, 3 or more\]"),
        ({"state": STATE[:1]}, r"state: expected shape \[2, 5, 3 or more\]"),
        ({"starts": torch.tensor([0, 1], dtype=torch.int32)}, "starts: expected dtype Long"),
        ({"starts": torch.tensor([0])}, r"starts: expected shape \[B\]"),
    ],
)
def test_bad_argument_of_a_convolution(change, message) -> None:
    arguments = {"x": X, "state": STATE.clone(), "weight": W, "bias": None, "starts": None, "silu": True, **change}
    before = arguments["state"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.causal_conv1d_update(**arguments)
    assert torch.equal(arguments["state"], before)
    if "starts" not in change and "state" not in change:
        with pytest.raises(RuntimeError, match=message):
            ops.causal_conv1d(arguments["x"], arguments["weight"], arguments["bias"])
    with pytest.raises(RuntimeError, match=r"before: expected shape \[B, D, W - 1\]"):
        ops.causal_conv1d(X, W, None, X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": U[0]}, r"u: expected shape \[B, H, P, L\]"),
        ({"u": U.double()}, "u: expected float32"),
        ({"delta": U[..., :5]}, "delta: expected shape"),
        ({"a": A[0]}, r"a: expected shape \[H, P, N\]"),
        ({"a": A[:3]}, r"a: expected shape \[H, P, N\]"),
        ({"b": B[0]}, r"b: expected shape \[B, G, N, L\]"),
        ({"b": draw(2, 3, 8, 6), "c": draw(2, 3, 8, 6)}, "b: expected a number of groups that divides the 4 heads"),
        ({"b": B[:, :0], "c": B[:, :0]}, "b: expected a number of groups"),
        ({"c": B[:, :1]}, r"c: expected shape \[2, 2, 8, 6\]"),
        ({"d": A}, r"d: expected shape \[H, P\]"),
        ({"z": U[:1]}, "z: expected shape"),
        ({"delta_bias": A[0, 0]}, r"delta_bias: expected shape \[H, P\]"),
        ({"state": H[..., :7]}, "state: expected shape"),
        ({"state": H.int()}, "state: expected float32"),
    ],
)
def test_bad_argument_of_a_scan(change, message) -> None:
    arguments = SCAN | {"state": H.clone()} | change
    before = arguments["state"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.selective_scan(**arguments)
    assert torch.equal(arguments["state"], before)


def test_opcheck() -> None:
    torch.library.opcheck(_ops.causal_conv1d.default, (X, W, W[:, 0], STATE, True))
    torch.library.opcheck(_ops.causal_conv1d_update.default, (X, STATE.clone(), W, None, torch.tensor([3, 4]), False))
    torch.library.opcheck(_ops.causal_conv1d_update.default, (X, STATE.clone(), W, None, None, False))
    torch.library.opcheck(_ops.selective_scan.default, tuple((SCAN | {"state": H.clone()}).values()))


def test_compile_without_graph_break() -> None:
    def run(x: torch.Tensor, state: torch.Tensor, u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        y = ops.causal_conv1d_update(x * 2, state, W, silu=True) + ops.causal_conv1d(x, W)
        b = B[..., : u.shape[3]]
        return y.sum() + ops.selective_scan(u, u, A, b, b, None, None, None, True, h)

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for length in (3, 4, 6):
        results = []
        for function in (run, compiled):
            state, h = STATE.clone(), H.clone()
            results.append((function(X[..., :length], state, U[..., :length], h), state, h))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
