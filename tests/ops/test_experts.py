"""Mixtures of experts; test_isa.py runs this file at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_stack import QuantizedStack
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import ExpertGate, PostOp, reference

from .weights import KINDS, MODES, draw, shuffle_features
from .weights import make as make_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = [ExpertGate(activation) for activation in (PostOp.SILU, PostOp.GELU, PostOp.NEW_GELU)]
CLAMPED = ExpertGate(PostOp.SILU, (0.7, 1.702, 1.0))
ALONE = [PostOp.RELU2, PostOp.RELU, PostOp.SILU, PostOp.GELU, PostOp.NEW_GELU]
ALONE = [ExpertGate(activation, gated=False) for activation in ALONE]
INT4 = WeightScheme(WoqWeightDtype.INT4, True, 32)
BYTES = (WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)
EXPERTS, HIDDEN, WIDTH = 5, 96, 40


def make_stack(experts: int, n: int, k: int, scheme: WeightScheme, act_order: bool = False) -> QuantizedStack:
    quantized = [make_weight(n, k, scheme, index) for index in range(experts)]
    if act_order:
        quantized = [shuffle_features(weight, index) for index, weight in enumerate(quantized)]
    return QuantizedStack.of(quantized)


def make(scheme: WeightScheme = INT4, act_order: bool = False, sizes=(EXPERTS, HIDDEN, WIDTH), blocks: int = 2):
    experts, hidden, width = sizes
    return (
        make_stack(experts, blocks * width, hidden, scheme, act_order),
        make_stack(experts, hidden, width, scheme, act_order),
    )


def pack(stacks):
    return ops.pack_experts(stacks[0], stacks[0].shape[1] // stacks[1].shape[2]), ops.pack_experts(stacks[1], 1)


def route(tokens: int, choices: int, experts: int = EXPERTS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, experts, (tokens, choices), generator=generator), torch.rand(tokens, choices)


def separately(x, experts, weights, stacks, gate, biases, modes):
    """The result from one call of a linear for every expert and projection."""
    sums = torch.zeros(x.shape)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        up, down = (ops.pack_weight(stack[expert]) for stack in stacks)
        bias = None if biases[0] is None else biases[0][expert].contiguous()
        both = ops.woq_linear(x[token], up.data, up.shape[0], bias, up.perm, *modes)
        if not gate.gated:
            hidden = ops.woq_linear(x[token], up.data, up.shape[0], bias, up.perm, *modes, gate.activation)
        elif gate.clamp is None and gate.activation == PostOp.SILU:
            hidden = ops.silu_mul_halves(both)
        elif gate.clamp is None:
            hidden = ops.gelu_mul_halves(both, gate.activation == PostOp.NEW_GELU)
        else:
            hidden = gate(*both.chunk(2, dim=-1))
        # A wide x would make wide sums, so the rounding of a narrow one is taken off where its values allow it.
        out = ops.woq_linear(hidden.float(), down.data, down.shape[0], None, down.perm, *modes)
        out = out if biases[1] is None else out + biases[1][expert]
        for row, (t, j) in enumerate(zip(token.tolist(), choice.tolist(), strict=True)):
            sums[t] += weights[t, j] * out[row]
    return sums.to(x.dtype)


calls = {
    "sizes": st.sampled_from([(1, 16, 8), (3, 100, 65), (7, 64, 128), (5, 130, 257)]),
    "tokens": st.sampled_from([0, 1, 2, 9, 40]),
    "choices": st.sampled_from([0, 1, 2, 3]),
    "kind": st.sampled_from(KINDS),
    "group_size": st.sampled_from([-1, 4, 32]),
    "act_order": st.booleans(),
    "bias": st.booleans(),
}


@settings(max_examples=100, deadline=None)
@given(modes=st.sampled_from(MODES), gate=st.sampled_from([*GATES, *ALONE]), **calls)
def test_has_the_bits_of_separate_linears(
    sizes, tokens, choices, kind, group_size, act_order, bias, modes, gate
) -> None:
    stacks = make(WeightScheme(*kind, group_size), act_order, sizes, gate.blocks)
    biases = (draw(sizes[0], gate.blocks * sizes[2]), draw(sizes[0], sizes[1])) if bias else (None, None)
    x = draw(tokens, sizes[1])
    experts, weights = route(tokens, choices, sizes[0])
    result = ops.woq_experts(x, experts, weights, *pack(stacks), gate, *biases, *modes)
    assert torch.equal(result, separately(x, experts, weights, stacks, gate, biases, modes))


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), gate=st.sampled_from([*GATES, CLAMPED, *ALONE]), **calls)
def test_computes_what_the_definition_does(
    sizes, tokens, choices, kind, group_size, act_order, bias, dtype, gate
) -> None:
    stacks = make(WeightScheme(*kind, group_size), act_order, sizes, gate.blocks)
    biases = (draw(sizes[0], gate.blocks * sizes[2]), draw(sizes[0], sizes[1])) if bias else (None, None)
    x = draw(tokens, sizes[1], dtype=dtype)
    experts, weights = route(tokens, choices, sizes[0])
    result = ops.woq_experts(x, experts, weights, *pack(stacks), gate, *biases)
    expected = reference.woq_experts(x, experts, weights, *stacks, gate, *biases)
    # A rounding of what lies in between may fall the other way, which a sum over the width then shows.
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_come_close_to_the_definition(dtype: torch.dtype) -> None:
    stacks, (experts, weights), x = make(), route(33, 2), draw(33, HIDDEN, dtype=dtype)
    result = ops.woq_experts(x, experts, weights, *pack(stacks), GATES[0], None, None, *BYTES)
    expected = reference.woq_experts(x, experts, weights, *stacks, GATES[0], None, None, *BYTES)
    torch.testing.assert_close(result, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unpacks_to_the_same_bits(kind, act_order: bool) -> None:
    for group_size in (-1, 32):
        for stack, packed in zip(
            stacks := make(WeightScheme(*kind, group_size), act_order, (3, 63, 70)), pack(stacks), strict=True
        ):
            back = ops.unpack_experts(packed)
            for name, tensor in stack.tensors().items():
                assert torch.equal(tensor.view(torch.uint8), back.tensors()[name].view(torch.uint8))
            assert back.tensors().keys() == stack.tensors().keys()


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_is_the_same_on_any_number_of_threads(tokens: int) -> None:
    packed, (experts, weights) = pack(make()), route(tokens, 2)
    x, before = draw(tokens, HIDDEN, dtype=torch.bfloat16), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.woq_experts(x, experts, weights, *packed, GATES[0], None, None, *BYTES))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_tokens_in_chunks_are_what_few_are() -> None:
    packed, (experts, weights), x = pack(make()), route(6000, 2), draw(6000, HIDDEN)
    result = ops.woq_experts(x, experts, weights, *packed, GATES[0])
    rows = [0, 1, 2999, 5999]
    few = ops.woq_experts(x[rows], experts[rows], weights[rows], *packed, GATES[0])
    torch.testing.assert_close(result[rows], few, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_reads_only_the_experts_that_are_chosen(tokens: int) -> None:
    experts, weights = torch.full((tokens, 2), 3), torch.rand(tokens, 2)
    experts[:, 1] = 1
    packed = pack(make())
    expected = ops.woq_experts(draw(tokens, HIDDEN), experts, weights, *packed, GATES[0])
    for each in packed:
        for unused in (0, 2, 4):
            each.data[64:].view(EXPERTS, -1)[unused] = 255  # NaN scales
    assert torch.equal(ops.woq_experts(draw(tokens, HIDDEN), experts, weights, *packed, GATES[0]), expected)
    experts[0, 0] = 0
    assert not ops.woq_experts(draw(tokens, HIDDEN), experts, weights, *packed, GATES[0])[0].isfinite().any()


@pytest.mark.parametrize("modes", [MODES[0], MODES[2], BYTES])
@pytest.mark.parametrize("tokens", [4, 60])
def test_nan_stays_in_its_token(tokens: int, modes) -> None:
    packed, (experts, weights), x = pack(make()), route(tokens, 2), draw(tokens, HIDDEN)
    expected = ops.woq_experts(x, experts, weights, *packed, GATES[0], None, None, *modes)
    x[1, 5] = torch.nan
    weights[2, 0] = torch.nan
    result = ops.woq_experts(x, experts, weights, *packed, GATES[0], None, None, *modes)
    assert result[1:3].isnan().all()
    rest = [0, *range(3, tokens)]
    assert torch.equal(result[rest], expected[rest])


def test_strided_and_narrow_arguments() -> None:
    packed, (experts, weights), x = pack(make()), route(6, 2), draw(6, 2 * HIDDEN)
    for dtype in DTYPES:
        narrow = weights.to(dtype)
        expected = ops.woq_experts(x[:, ::2].contiguous(), experts, narrow.float(), *packed, GATES[0])
        assert torch.equal(ops.woq_experts(x[:, ::2], experts.int(), narrow, *packed, GATES[0]), expected)


def call(**changes):
    packed, (experts, weights) = pack(make()), route(4, 2)
    arguments = {
        "x": draw(4, HIDDEN),
        "experts": experts,
        "weights": weights,
        "gate_up": packed[0].data,
        "down": packed[1].data,
        "gate_up_bias": None,
        "down_bias": None,
        "gate_up_perm": None,
        "down_perm": None,
        "num_experts": EXPERTS,
        "intermediate": WIDTH,
        "lowp_mode": 0,
        "act_quant_mode": -1,
        "activation": 4,
        "clamp": [],
        "gated": True,
    }
    return torch.ops.ipex_quant.woq_experts(*(arguments | changes).values())


UP_ALONE = pack(make(blocks=1))[0].data
BAD = [
    ({"x": torch.ones(4, HIDDEN, dtype=torch.float64)}, "x: expected float32, bfloat16 or float16"),
    ({"x": torch.ones(2, 2, HIDDEN)}, r"x: expected shape \[tokens, hidden\]"),
    ({"x": torch.ones(3, HIDDEN)}, r"experts: expected shape \[3, 2\]"),
    ({"x": torch.ones(4, 32)}, "packed: expected 5 experts, 640 rows and 32 input features"),
    ({"x": torch.ones(4, 0)}, r"x: expected shape \[tokens, hidden\]"),
    ({"experts": torch.full((4, 2), EXPERTS)}, r"experts: expected values in 0\.\.4, got 5"),
    ({"experts": torch.full((4, 2), -1)}, r"experts: expected values in 0\.\.4, got -1"),
    ({"experts": torch.full((4, 2), 2**62)}, r"experts: expected values in 0\.\.4"),
    ({"experts": torch.ones(4, 2)}, "experts: expected dtype Long"),
    ({"experts": torch.zeros(4, dtype=torch.int64)}, "experts: expected 2 dimensions"),
    ({"weights": torch.ones(4, 3)}, r"weights: expected shape \[4, 2\]"),
    ({"weights": torch.ones(4, 2).int()}, "weights: expected float32, bfloat16 or float16"),
    ({"gate_up": torch.zeros(100, dtype=torch.uint8)}, "packed: not a packed weight"),
    ({"gate_up": torch.zeros(3, dtype=torch.uint8)}, "packed: too short"),
    ({"gate_up_bias": torch.ones(EXPERTS, WIDTH)}, r"gate_up_bias: expected shape \[5, 80\]"),
    ({"down_bias": torch.ones(EXPERTS)}, "down_bias: expected 2 dimensions"),
    ({"gate_up_perm": torch.zeros(EXPERTS, 3, dtype=torch.int32)}, r"gate_up_perm: expected shape \[5, 96\]"),
    ({"gate_up_perm": torch.full((EXPERTS, HIDDEN), HIDDEN).int()}, r"gate_up_perm: expected values in 0\.\.95"),
    ({"down_perm": torch.full((EXPERTS, WIDTH), -1).int()}, r"down_perm: expected values in 0\.\.39"),
    ({"num_experts": 4}, "packed: expected 4 experts, 512 rows"),
    ({"num_experts": 0}, "0 < num_experts"),
    ({"num_experts": 2**60}, "0 < num_experts"),
    ({"intermediate": 65}, "packed: expected 5 experts, 1280 rows"),
    ({"intermediate": 0}, "0 < intermediate"),
    ({"intermediate": 2**62}, "0 < intermediate"),
    ({"lowp_mode": 9}, "lowp_mode: expected"),
    ({"lowp_mode": 3}, "act_quant_mode: INT8 compute needs"),
    ({"activation": 1}, "activation: expected"),
    ({"clamp": [1.0]}, "clamp: expected nothing"),
    ({"clamp": [1.0, 1.0, 1.0], "activation": 2}, "clamp: expected nothing"),
    ({"gated": False}, "packed: expected 5 experts, 320 rows"),
    ({"gated": False, "gate_up": UP_ALONE, "activation": 0}, r"activation: expected one of 1\.\.4 or 8 without a gate"),
    ({"gated": False, "gate_up": UP_ALONE, "activation": 7}, r"activation: expected one of 1\.\.4 or 8 without a gate"),
    ({"gated": False, "gate_up": UP_ALONE, "clamp": [1.0, 1.0, 1.0]}, "clamp: expected nothing without a gate"),
    (
        {"gated": False, "gate_up": UP_ALONE, "gate_up_bias": torch.ones(5, 80)},
        r"gate_up_bias: expected shape \[5, 40\]",
    ),
    ({"gate_up": UP_ALONE}, "packed: expected 5 experts, 640 rows"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused(change, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(**change)


def test_a_cut_off_weight_is_refused() -> None:
    data = pack(make())[0].data
    with pytest.raises(RuntimeError, match=r"packed: expected [0-9]+ bytes"):
        call(gate_up=data[:-1].clone())


def test_experts_of_different_schemes_are_refused() -> None:
    weights = [affine.quantize(draw(4, 32), WeightScheme(WoqWeightDtype.INT4, True, size)) for size in (16, 32)]
    with pytest.raises(ValueError, match=r"one scheme.* int4 sym g16 .* for expert 0, int4 sym g32 .* for expert 1"):
        QuantizedStack.of(weights)


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(gated: bool) -> None:
    packed, (experts, weights) = pack(make(blocks=2 if gated else 1)), route(4, 2)
    arguments = (draw(4, HIDDEN), experts, weights, packed[0].data, packed[1].data, *[None] * 4)
    options = (EXPERTS, WIDTH, *map(int, BYTES), 4, [], gated)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.ipex_quant.woq_experts.default, (*arguments, *options), test_utils=checks)
    torch.library.opcheck(
        torch.ops.ipex_quant.woq_experts_backward.default,
        (draw(4, HIDDEN, seed=2), *arguments, *options),
        test_utils=checks,
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("gate", [*GATES, CLAMPED, *ALONE])
def test_gradients_are_those_of_float_experts(gate: ExpertGate, act_order: bool) -> None:
    stacks = make(act_order=act_order, blocks=gate.blocks)
    biases = draw(EXPERTS, gate.blocks * WIDTH), draw(EXPERTS, HIDDEN)
    experts, weights = route(6, 2)
    x = draw(6, HIDDEN).requires_grad_()
    weights.requires_grad_()
    result = ops.woq_experts(x, experts, weights, *pack(stacks), gate, *biases)
    result.pow(2).sum().backward()
    own = x.grad, weights.grad
    y, v = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    floats = []
    for token in range(6):
        for choice in range(2):
            expert = int(experts[token, choice])
            both = affine.dequantize(stacks[0][expert]) @ y[token] + biases[0][expert]
            down = affine.dequantize(stacks[1][expert]) @ gate(*both.chunk(gate.blocks)) + biases[1][expert]
            floats.append(v[token, choice] * down)
    expected = torch.stack(floats).view(6, 2, HIDDEN).sum(1)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    expected.pow(2).sum().backward()
    for got, wanted in zip(own, (y.grad, v.grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
