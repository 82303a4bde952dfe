"""The parts of Mamba layers against loops over single elements in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ipex_quant.llm.modules import MambaMixer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A rounding to the dtype; sums in float32 stay below 1e-5 of what they would be if nothing cancelled (`size`).
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def close(got, wanted, size):
    assert got.shape == wanted.shape
    bound = 1e-5 * size + RTOL[got.dtype] * wanted.abs() + 2.0**-25  # the last is half of float16's smallest number
    assert ((got.double() - wanted).abs() <= bound).all(), ((got.double() - wanted).abs() / bound).max()


def silu(x):
    return x / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


# ------------------------------------------------------------------------------------------------------- convolutions
def convolved(inputs, weight, bias, activation, length):
    """The last `length` outputs of ``[B, D, before + length]``, and the same of absolute values."""
    batch, channels, total = inputs.shape
    width = weight.shape[1]
    result, size = torch.zeros(2, batch, channels, length, dtype=torch.float64)
    for b in range(batch):
        for d in range(channels):
            for i in range(length):
                terms = [0.0 if bias is None else bias[d].item()]
                for w in range(width):
                    at = total - length + i - (width - 1) + w
                    terms.append(inputs[b, d, at].item() * weight[d, w].item() if at >= 0 else 0.0)
                y = sum(terms)
                result[b, d, i] = y if activation is None else silu(y)
                size[b, d, i] = sum(map(abs, terms))
    return result, size


class TestConvolution:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("length", "width", "bias", "initial", "activation"),
        [
            (1, 4, True, True, "silu"),
            (2, 4, True, False, "silu"),
            (19, 4, False, True, None),
            (40, 3, True, True, "swish"),
            (9, 1, True, False, "silu"),
            (0, 4, True, True, "silu"),
        ],
    )
    def test_result_and_final_states(self, dtype, length, width, bias, initial, activation):
        x, weight = torch.randn(2, 5, length).to(dtype), torch.randn(5, width).to(dtype)
        bias = torch.randn(5).to(dtype) if bias else None
        before = torch.randn(2, 5, width - 1).to(dtype) if initial else torch.zeros(2, 5, width - 1, dtype=dtype)
        got, final = MambaMixer.causal_conv1d_fn(
            x, weight, bias, before if initial else None, return_final_states=True, activation=activation
        )
        inputs = torch.cat((before, x), -1)
        close(got, *convolved(inputs, weight, bias, activation, length))
        assert got.dtype == final.dtype == dtype
        assert torch.equal(final, inputs[..., length:])

    def test_is_followed_by_silu_unless_told(self):
        x, weight = torch.randn(1, 3, 6), torch.randn(3, 4)
        result, final = MambaMixer.causal_conv1d_fn(x, weight)
        assert final is None
        plain, _ = MambaMixer.causal_conv1d_fn(x, weight, activation=None)
        torch.testing.assert_close(result, torch.nn.functional.silu(plain))

    @pytest.mark.parametrize("out_dtype", DTYPES)
    def test_writes_final_states_where_told(self, out_dtype):
        x, weight = torch.randn(2, 3, 2), torch.randn(3, 4)
        states = torch.randn(2, 3, 3).to(out_dtype)
        expected = torch.cat((states[..., 2:], x.to(out_dtype)), -1)
        _, final = MambaMixer.causal_conv1d_fn(x, weight, None, states, True, states)
        assert final is states
        assert torch.equal(final, expected)
        kept = torch.randn(2, 3, 3)
        before = kept.clone()
        MambaMixer.causal_conv1d_fn(x, weight, None, kept)
        assert torch.equal(kept, before)

    def test_dtypes_and_strides_of_their_own(self):
        x, weight = torch.randn(2, 9, 5).bfloat16().transpose(1, 2), torch.randn(4, 5).t()
        bias, initial = torch.randn(10).half()[::2], torch.randn(2, 3, 5).transpose(1, 2)
        got, final = MambaMixer.causal_conv1d_fn(x, weight, bias, initial, True)
        close(got, *convolved(torch.cat((initial, x.float()), -1), weight, bias, "silu", 9))
        assert got.dtype == final.dtype == torch.bfloat16
        assert torch.equal(final, x[..., -3:])

    @torch.enable_grad()
    def test_has_gradients(self):
        x, weight, bias, initial = (
            torch.randn(shape, requires_grad=True) for shape in ((1, 3, 6), (3, 4), (3,), (1, 3, 3))
        )

        def run(activation):
            result, final = MambaMixer.causal_conv1d_fn(x, weight, bias, initial, True, activation=activation)
            assert not final.requires_grad
            return result

        gradients = torch.autograd.grad(run("silu").sum(), (x, weight, bias, initial))
        plain = run(None).detach()
        slope = torch.sigmoid(plain) * (1 + plain * (1 - torch.sigmoid(plain)))
        torch.testing.assert_close(gradients[2], slope.sum((0, 2)))
        torch.testing.assert_close(gradients[0][0, :, -1], slope[0, :, -1] * weight[:, -1])
        torch.testing.assert_close(gradients[3][0, :, 0], slope[0, :, 0] * weight[:, 0])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"activation": "gelu"}, NotImplementedError, "activation must be None, silu, or swish, got 'gelu'"),
            ({"x": torch.ones(3, 8)}, ValueError, r"x: expected \[B, D, L\]"),
            ({"x": torch.ones(2, 3, 8).double()}, TypeError, "x: expected float32, bfloat16 or float16"),
            ({"weight": torch.ones(4, 4)}, ValueError, r"weight: expected \[D, W\], here \[3, any\], got \[4, 4\]"),
            ({"weight": torch.ones(3, 0)}, ValueError, "weight: expected .* W > 0"),
            ({"bias": torch.ones(4)}, ValueError, r"bias: expected \[D\], here \[3\], got \[4\]"),
            ({"initial_states": torch.ones(2, 3, 4)}, ValueError, r"initial_states: expected \[B, D, W - 1\]"),
            ({"final_states_out": torch.ones(1, 3, 3)}, ValueError, r"final_states_out: expected \[B, D, W - 1\]"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, error, message):
        arguments = {"x": torch.ones(2, 3, 8), "weight": torch.ones(3, 4), "return_final_states": True, **change}
        with pytest.raises(error, match=message):
            MambaMixer.causal_conv1d_fn(**arguments)


class TestConvolutionUpdate:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("ring", [False, True])
    @pytest.mark.parametrize("columns", [3, 4, 7])
    @pytest.mark.parametrize("lengths", [[1, 1, 1, 1, 1], [2, 1, 5, 3], [9, 4]])
    def test_steps_are_those_of_the_whole(self, dtype, ring, columns, lengths):
        total = sum(lengths)
        x, weight, bias = torch.randn(2, 5, total).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
        whole, _ = MambaMixer.causal_conv1d_fn(x, weight, bias)
        state, done = torch.zeros(2, 5, columns, dtype=dtype), 0
        first = torch.tensor([columns * 3, columns * 5 + 1], dtype=torch.int32)
        for length in lengths:
            step = x[..., done : done + length]
            numbers = first + done if ring else None
            got = MambaMixer.causal_conv1d_update(step, state, weight, bias, "silu", numbers)
            torch.testing.assert_close(got, whole[..., done : done + length])
            done += length
        last = torch.cat((torch.zeros(2, 5, columns, dtype=dtype), x), -1)[..., -columns:]
        for b in range(2):
            places = [(first[b].item() + total - columns + i) % columns if ring else i for i in range(columns)]
            assert torch.equal(state[b][:, places], last[b])

    def test_one_token_without_a_length(self):
        x, state, weight = torch.randn(2, 5), torch.randn(2, 5, 3), torch.randn(5, 4)
        inputs = torch.cat((state, x[..., None]), -1)
        got = MambaMixer.causal_conv1d_update(x, state, weight)
        result, size = convolved(inputs, weight, None, None, 1)
        close(got, result[..., 0], size[..., 0])
        assert torch.equal(state, inputs[..., 1:])

    def test_writes_through_views_and_without_gradients(self):
        base = torch.randn(4, 5, 2, 3)
        state, kept, weight = base[1, :, :, :].permute(1, 0, 2), base.clone(), torch.randn(5, 4, requires_grad=True)
        inputs = torch.cat((state, torch.ones(2, 5, 1)), -1)
        got = MambaMixer.causal_conv1d_update(torch.ones(2, 5), state, weight)
        assert not got.requires_grad
        assert torch.equal(state, inputs[..., 1:])
        assert torch.equal(base[[0, 2, 3]], kept[[0, 2, 3]])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"activation": "relu"}, NotImplementedError, "activation must be None, silu, or swish"),
            ({"x": torch.ones(3)}, ValueError, r"x: expected \[B, D, L\]"),
            ({"conv_state": torch.full((2, 3, 2), 7.0)}, ValueError, "conv_state: expected 3 columns or more"),
            ({"conv_state": torch.full((1, 3, 3), 7.0)}, ValueError, r"conv_state: expected \[B, D, W - 1 or more\]"),
            ({"weight": torch.ones(2, 4)}, ValueError, r"weight: expected \[D, W\]"),
            ({"cache_seqlens": torch.tensor([1])}, ValueError, r"cache_seqlens: expected int32 or int64 \[2\]"),
            ({"cache_seqlens": torch.ones(2)}, ValueError, r"cache_seqlens: expected int32 or int64 \[2\]"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, error, message):
        arguments = {
            "x": torch.ones(2, 3),
            "conv_state": torch.full((2, 3, 3), 7.0),
            "weight": torch.ones(3, 4),
            **change,
        }
        with pytest.raises(error, match=message):
            MambaMixer.causal_conv1d_update(**arguments)
        assert arguments["conv_state"].eq(7).all()


# -------------------------------------------------------------------------------------------------------------- scans
def scanned(u, delta, a, b, c, d=None, z=None, bias=None, soft=False, state=None):
    """Results, sizes, the last state and its size; all tensors but `state` as in `selective_scan_fn`, b and c 4-D."""
    batch, channels, length = u.shape
    states = a.shape[1]
    y, y_size = torch.zeros(2, batch, channels, length, dtype=torch.float64)
    h = torch.zeros(batch, channels, states, dtype=torch.float64) if state is None else state.double()
    h_size = h.abs()
    u, delta, a, b, c = (tensor.double() for tensor in (u, delta, a, b, c))
    for i in range(batch):
        for k in range(channels):
            group = k * b.shape[1] // channels, k * c.shape[1] // channels
            for t in range(length):
                step = delta[i, k, t].item() + (0.0 if bias is None else bias[k].item())
                step = softplus(step) if soft else step
                decay, added = (step * a[k]).exp(), step * b[i, group[0], :, t] * u[i, k, t]
                h[i, k] = decay * h[i, k] + added
                h_size[i, k] = decay * h_size[i, k] + added.abs()
                skip = 0.0 if d is None else (d[k] * u[i, k, t]).item()
                gate = 1.0 if z is None else silu(z[i, k, t].item())
                y[i, k, t] = (c[i, group[1], :, t] @ h[i, k] + skip) * gate
                y_size[i, k, t] = (c[i, group[1], :, t].abs() @ h_size[i, k] + abs(skip)) * abs(gate)
    return y, y_size, h, h_size


def scan_inputs(batch, channels, states, length, dtype=torch.float32, groups=1):
    u, z = (torch.randn(batch, channels, length).to(dtype) for _ in range(2))
    delta = torch.rand(batch, channels, length).to(dtype)
    b, c = (torch.randn(batch, groups, states, length).to(dtype) for _ in range(2))
    return u, delta, -torch.rand(channels, states), b, c, torch.randn(channels), z, torch.rand(channels) - 0.5


class TestScan:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("batch", "channels", "states", "length", "groups"),
        [(1, 4, 8, 40, 2), (2, 6, 16, 7, 1), (1, 3, 5, 1, 3), (2, 2, 1, 33, 1), (1, 3, 20, 0, 1), (1, 70, 3, 2, 1)],
    )
    @pytest.mark.parametrize("soft", [False, True])
    def test_is_the_recurrence(self, dtype, batch, channels, states, length, groups, soft):
        u, delta, a, b, c, d, z, bias = scan_inputs(batch, channels, states, length, dtype, groups)
        got, last = MambaMixer.selective_scan_fn(u, delta, a, b, c, d, z, bias, soft, return_last_state=True)
        y, y_size, h, h_size = scanned(u, delta, a, b, c, d, z, bias, soft)
        close(got, y, y_size)
        close(last, h, h_size)
        assert (got.dtype, last.dtype) == (dtype, torch.float32)

    @pytest.mark.parametrize("without", ["D", "z", "delta_bias", "all"])
    def test_optional_parts(self, without):
        u, delta, a, b, c, *rest = scan_inputs(1, 3, 4, 6)
        given = dict(zip(("D", "z", "delta_bias"), rest, strict=True))
        given = {name: None if without in (name, "all") else tensor for name, tensor in given.items()}
        got = MambaMixer.selective_scan_fn(u, delta, a, b, c, **given)
        y, y_size, *_ = scanned(u, delta, a, b, c, *given.values())
        close(got, y, y_size)

    def test_factors_of_three_or_two_dimensions(self):
        u, delta, a, b, c, *rest = scan_inputs(2, 4, 5, 6)
        expected = MambaMixer.selective_scan_fn(u, delta, a, b, c, *rest)
        assert torch.equal(MambaMixer.selective_scan_fn(u, delta, a, b[:, 0], c[:, 0], *rest), expected)
        fixed = torch.randn(4, 5)
        got = MambaMixer.selective_scan_fn(u, delta, a, fixed, c, *rest)
        y, y_size, *_ = scanned(u, delta, a, fixed.expand(2, 4, 5).unsqueeze(-1).expand(2, 4, 5, 6), c, *rest)
        close(got, y, y_size)

    def test_groups_of_their_own(self):
        u, delta, a, b, _, *rest = scan_inputs(2, 6, 5, 7, groups=2)
        c = torch.randn(2, 3, 5, 7)
        got = MambaMixer.selective_scan_fn(u, delta, a, b, c, *rest)
        y, y_size, *_ = scanned(u, delta, a, b, c, *rest)
        close(got, y, y_size)

    def test_strides_of_their_own(self):
        u, delta, a, b, c, d, z, bias = scan_inputs(2, 6, 5, 7, groups=2)
        expected = MambaMixer.selective_scan_fn(u, delta, a, b, c, d, z, bias)
        u, z = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (u, z))
        b, c = (each.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for each in (b, c))
        a, d = a.t().contiguous().t(), torch.stack((d, d), -1)[:, 0]
        torch.testing.assert_close(MambaMixer.selective_scan_fn(u, delta, a, b, c, d, z, bias), expected)

    def test_softplus_of_large_and_small_numbers(self):
        delta = torch.tensor([[[-200.0, -90.0, -30.0, -3.0, 0.0, 3.0, 19.0, 21.0, 90.0, 200.0]]])
        ones = torch.ones(1, 1, 10)
        # with A = 0 and C = 1 the result is the running sum of what is added
        got = MambaMixer.selective_scan_fn(ones, delta, torch.zeros(1, 1), ones, ones, delta_softplus=True)
        expected = torch.tensor([softplus(x) for x in delta.flatten().tolist()], dtype=torch.float64).cumsum(0)
        torch.testing.assert_close(got.flatten().double(), expected, rtol=2e-6, atol=1e-30)

    def test_nan_stays_in_its_channel(self):
        u, *rest = scan_inputs(1, 3, 4, 6)
        u[0, 1, 2] = torch.nan
        got = MambaMixer.selective_scan_fn(u, *rest)
        assert got[0, 1, 2:].isnan().all()
        assert got[0, [0, 2]].isfinite().all()
        assert got[0, 1, :2].isfinite().all()

    @torch.enable_grad()
    def test_has_gradients(self):
        inputs = [tensor.requires_grad_() for tensor in scan_inputs(1, 3, 4, 5)]
        got = MambaMixer.selective_scan_fn(*inputs, delta_softplus=True)
        gradients = torch.autograd.grad(got.sum(), inputs)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            direction, step = torch.randn_like(tensor), 1e-3
            with torch.no_grad():
                ends = []
                for sign in (1, -1):
                    moved = [each + sign * step * direction if each is tensor else each for each in inputs]
                    ends.append(MambaMixer.selective_scan_fn(*moved, delta_softplus=True).double().sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close((gradient * direction).sum().double(), slope, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"u": torch.ones(2, 4)}, ValueError, r"u: expected \[B, D, L\]"),
            ({"delta": torch.ones(2, 4, 5)}, ValueError, r"delta: expected \[B, D, L\], here \[2, 4, 6\]"),
            ({"A": torch.ones(3, 8)}, ValueError, r"A: expected \[D, N\], here \[4, any\], got \[3, 8\]"),
            ({"A": torch.ones(4, 8, dtype=torch.complex64)}, TypeError, "A: expected float32"),
            ({"B": torch.ones(2, 3, 8, 6)}, ValueError, "B: expected a number of groups that divides 4, got 3"),
            ({"C": torch.ones(2, 0, 8, 6)}, ValueError, "C: expected a number of groups that divides 4, got 0"),
            ({"C": torch.ones(2, 8, 12)}, ValueError, r"C: expected \[D, N\], \[B, N, L\] or \[B, G, N, L\]"),
            ({"B": torch.ones(8)}, ValueError, "B: expected"),
            ({"D": torch.ones(3)}, ValueError, r"D: expected \[D\]"),
            ({"z": torch.ones(2, 4, 6).long()}, TypeError, "z: expected float32"),
            ({"delta_bias": torch.ones(4, 1)}, ValueError, r"delta_bias: expected \[D\]"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, error, message):
        arguments = {
            **{"u": torch.ones(2, 4, 6), "delta": torch.ones(2, 4, 6), "A": torch.ones(4, 8)},
            **{"B": torch.ones(2, 8, 6), "C": torch.ones(2, 8, 6), **change},
        }
        with pytest.raises(error, match=message):
            MambaMixer.selective_scan_fn(**arguments)


class TestStateUpdate:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("state_dtype", [torch.float32, None])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize(("heads", "groups", "dim", "states"), [(None, 1, 9, 16), (6, 2, 4, 5), (4, 4, 1, 8)])
    def test_is_one_step_from_the_state(self, dtype, state_dtype, soft, heads, groups, dim, states):
        channels = dim * (heads or 1)
        u, delta, a, b, c, d, z, bias = scan_inputs(2, channels, states, 1, dtype, groups)
        state = torch.randn(2, channels, states).to(state_dtype or dtype)
        y, y_size, h, h_size = scanned(u, delta, a, b, c, d, z, bias, soft, state)
        shape = (heads, dim) if heads else (dim,)
        given = state.view(2, *shape, states)
        x, dt, gate = (each[..., 0].view(2, *shape) for each in (u, delta, z))
        b, c = (each[..., 0] if heads else each[:, 0, :, 0] for each in (b, c))
        got = MambaMixer.selective_state_update(
            given, x, dt, a.view(*shape, states), b, c, d.view(shape), gate, bias.view(shape), soft
        )
        assert got.dtype == dtype
        close(got.reshape(2, channels, 1), y, y_size)
        close(state, h, h_size)

    def test_values_per_head_spread_over_it(self):
        """As Mamba 2 calls it: A, dt, D and the bias are one number a head."""
        heads, dim, states = 4, 8, 16
        dt, a, d, bias = torch.rand(2, heads), -torch.rand(heads), torch.randn(heads), torch.rand(heads)
        x, z = torch.randn(2, 2, heads, dim)
        b, c = torch.randn(2, 2, 2, states)
        state = torch.randn(2, heads, dim, states)
        spread = dt[..., None].expand(2, heads, dim), a[:, None, None].expand(heads, dim, states)
        tail = d[:, None].expand(heads, dim), z, bias[:, None].expand(heads, dim), True
        other = state.clone()
        dense = [each.contiguous() for each in spread], [each if each is True else each.contiguous() for each in tail]
        got = MambaMixer.selective_state_update(state, x, *spread, b, c, *tail)
        expected = MambaMixer.selective_state_update(other, x, *dense[0], b, c, *dense[1])
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(state, other)

    def test_writes_through_views_and_without_gradients(self):
        base = torch.randn(3, 4, 2, 8)
        state, kept = base[1].transpose(0, 1), base.clone()
        ones = torch.ones(2, 4, requires_grad=True)
        a, b = -torch.ones(4, 8), torch.ones(2, 8)
        expected = state.clone()
        MambaMixer.selective_state_update(expected, ones, ones, a, b, b)
        assert not MambaMixer.selective_state_update(state, ones, ones, a, b, b).requires_grad
        assert torch.equal(state, expected)
        assert torch.equal(base[[0, 2]], kept[[0, 2]])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"state": torch.full((2, 4), 7.0)}, ValueError, r"state: expected \[B, D, N\] or \[B, H, D, N\]"),
            ({"state": torch.full((2, 6, 4, 8), 7)}, TypeError, "state: expected float32"),
            ({"x": torch.ones(2, 4)}, ValueError, r"x: expected \[B, H, D\], here \[2, 6, 4\], got \[2, 4\]"),
            ({"dt": torch.ones(2, 6)}, ValueError, r"dt: expected \[B, H, D\]"),
            ({"A": torch.ones(4, 8)}, ValueError, r"A: expected \[H, D, N\]"),
            ({"B": torch.ones(2, 4, 8)}, ValueError, "B: expected a number of groups that divides 6, got 4"),
            ({"C": torch.ones(2, 2, 9)}, ValueError, r"C: expected \[B, N\] or \[B, G, N\], here \[2, any, 8\]"),
            ({"D": torch.ones(6)}, ValueError, r"D: expected \[H, D\]"),
            ({"z": torch.ones(2, 6, 5)}, ValueError, r"z: expected \[B, H, D\]"),
            ({"dt_bias": torch.ones(4)}, ValueError, r"dt_bias: expected \[H, D\]"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, error, message):
        arguments = {
            **{"state": torch.full((2, 6, 4, 8), 7.0), "x": torch.ones(2, 6, 4), "dt": torch.ones(2, 6, 4)},
            **{"A": torch.ones(6, 4, 8), "B": torch.ones(2, 3, 8), "C": torch.ones(2, 3, 8), **change},
        }
        with pytest.raises(error, match=message):
            MambaMixer.selective_state_update(**arguments)
        assert arguments["state"].eq(7).all()
