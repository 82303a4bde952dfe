import pytest
import torch

from ipex_quant import ops
from ipex_quant.llm import functional, modules

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
H, KV, D = 4, 2, 24
LENGTHS = [(3, 3), (1, 7), (5, 5), (0, 2), (4, 9)]
OPTIONS = {
    "causal": ({}, {}),
    "full": ({"is_causal": False}, {"causal": False}),
    "window": ({"window_size_left": 2}, {"left": 2}),
    "both_sides": (
        {"is_causal": False, "window_size_left": 3, "window_size_right": 1},
        {"causal": False, "left": 3, "right": 1},
    ),
    "right_only": ({"is_causal": False, "window_size_right": 2}, {"causal": False, "right": 2}),
    "left_only": ({"is_causal": False, "window_size_left": 2}, {"causal": False, "left": 2}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "window_and_softcap": ({"softcap": 1.5, "window_size_left": 0}, {"softcap": 1.5, "left": 0}),
}


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(lengths=LENGTHS, dtype=torch.float32, value_dim=D):
    queries, keys = (sum(column) for column in zip(*lengths, strict=True))
    states = torch.randn(queries, H, D), torch.randn(keys, KV, D), torch.randn(keys, KV, value_dim)
    return [state.to(dtype) for state in states]


def call(states, lengths=LENGTHS, out=None, **options):
    queries, keys = zip(*lengths, strict=True)
    options = {"softmax_scale": 0.3, **options}
    ends = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
    return functional.varlen_attention(*states, out, starts(queries), starts(keys), **ends, **options)


def expected(dense, states, lengths=LENGTHS, **options):
    query, key, value = states
    counts = [[pair[i] for pair in lengths] for i in (0, 1)]
    parts = zip(query.split(counts[0]), key.split(counts[1]), value.split(counts[1]), strict=True)
    return torch.cat([dense(*part, 0.3, **options) for part in parts]).to(query.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_attends_within_each_sequence(dense, name, dtype):
    given, meant = OPTIONS[name]
    states = tensors(dtype=dtype)
    torch.testing.assert_close(call(states, **given), expected(dense, states, **meant), **TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient(dense, name):
    given, meant = OPTIONS[name]
    states = tensors()
    with torch.enable_grad():
        gradients = []
        for function, options in ((call, given), (lambda x, **o: expected(dense, x, **o), meant)):
            leaves = [state.clone().requires_grad_() for state in states]
            function(leaves, **options).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_values_of_another_size(dense):
    states = tensors(value_dim=10)
    torch.testing.assert_close(call(states), expected(dense, states))


@pytest.mark.parametrize("by_gradient", [False, True])
def test_alibi(dense, by_gradient):
    states, slopes = tensors(), torch.rand(H)
    with torch.set_grad_enabled(by_gradient):
        states[0].requires_grad_(by_gradient)
        result = call(states, alibi_slopes=slopes).detach()
    torch.testing.assert_close(result, expected(dense, [s.detach() for s in states], alibi=slopes))


def test_scale_is_that_of_the_head_dimension_by_default():
    states = tensors()
    torch.testing.assert_close(call(states, softmax_scale=None), call(states, softmax_scale=D**-0.5))


def test_more_queries_than_keys_see_nothing_at_first(dense):
    lengths = [(5, 2)]
    states = tensors(lengths)
    result = call(states, lengths)
    assert result[:3].eq(0).all()
    torch.testing.assert_close(result, expected(dense, states, lengths))


def test_all_sequences_are_one_call(monkeypatch):
    states = tensors()
    expected = call(states)
    monkeypatch.setattr(ops, "attention", None)
    assert torch.equal(call(states), expected)


def test_no_sequences():
    states = tensors([(0, 0)])
    assert call(states, [(0, 0)]).shape == (0, H, D)
    assert functional.varlen_attention(*states, None, torch.tensor([0]), torch.tensor([0]), 0, 0).shape == (0, H, D)


def test_nan_stays_in_its_sequence():
    states = tensors()
    states[1][4] = torch.nan
    result = call(states)
    assert result[3].isnan().any()
    assert result[[0, 1, 2, *range(4, 13)]].isfinite().all()


class TestSignatures:
    def test_those_of_the_document_and_of_ipex(self):
        states, ends = tensors(), (starts([q for q, _ in LENGTHS]), starts([k for _, k in LENGTHS]))
        result = call(states)
        for further in (
            (5, 9, 0.0, 0.3, False, True, False, None),
            (None, 5, 9, 0.0, 0.3, False, True, False, None),
            (None, 5, 9, 0.0, 0.3, False, True, False, None, -1, -1, -1.0),
            (torch.zeros(H), 5, 9, 0.0, 0.3, False, True, False, None),
            (5, 9, 0.0, 0.3),
            (torch.tensor(5), torch.tensor(9), 0.0, 0.3),
        ):
            for function in (
                functional.varlen_attention,
                modules.VarlenAttention(),
                modules.VarlenAttention.apply_function,
            ):
                out = torch.full_like(states[0], torch.nan)
                assert function(*states, out, *ends, *further) is out
                torch.testing.assert_close(out, result)

    def test_arguments_twice(self):
        with pytest.raises(TypeError, match="max_seqlen_q"):
            functional.varlen_attention(*tensors(), None, starts([3]), starts([3]), 3, 3, max_seqlen_q=3)


class TestDropout:
    LENGTHS = ((4, 6),)

    def test_drops_weights_and_scales_the_rest(self):
        query, key, _ = tensors(self.LENGTHS)
        value = torch.eye(6)[:, None].expand(6, KV, 6)  # so that the result is the attention weights
        whole = call([query, key, value], self.LENGTHS)
        generator = torch.Generator().manual_seed(3)
        runs = torch.stack([call([query, key, value], self.LENGTHS, pdropout=0.25, gen_=generator) for _ in range(400)])
        torch.testing.assert_close(runs, torch.where(runs > 0, whole / 0.75, 0.0).expand_as(runs))
        dropped = (runs == 0)[:, whole > 0].float().mean()
        assert abs(dropped - 0.25) < 0.02

    def test_generator_decides(self):
        states = tensors(self.LENGTHS)
        one, same, other = (
            call(states, self.LENGTHS, pdropout=0.5, gen_=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestErrors:
    def refused(self, message, states=None, error=ValueError, seqlen_q=None, seqlen_k=None, **options):
        states = tensors([(3, 3)]) if states is None else states
        out = torch.zeros(3, H, D)
        ends = (torch.tensor([0, 3]) if seqlen is None else seqlen for seqlen in (seqlen_q, seqlen_k))
        with pytest.raises(error, match=message):
            functional.varlen_attention(
                *states, **{"out": out, **dict(zip(("seqlen_q", "seqlen_k"), ends, strict=True)),
                            "max_seqlen_q": 3, "max_seqlen_k": 3, **options}
            )  # fmt: skip
        assert out.eq(0).all()

    @pytest.mark.parametrize("name", ["seqlen_q", "seqlen_k"])
    @pytest.mark.parametrize(
        "numbers", [[1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [-1, 3]]
    )  # fmt: skip
    def test_starts_that_are_none(self, name, numbers):
        self.refused(f"{name}: expected starts of sequences from 0 up to 3", **{name: torch.tensor(numbers)})

    def test_starts_of_another_kind(self):
        self.refused(r"seqlen_q: expected integers \[sequences \+ 1\]", seqlen_q=torch.tensor(1))
        self.refused(r"seqlen_k: expected integers \[sequences \+ 1\]", seqlen_k=torch.tensor([0.0, 3.0]))
        self.refused("seqlen_q, seqlen_k: expected one length, got 3 and 2", seqlen_q=torch.tensor([0, 1, 3]))

    def test_options(self):
        self.refused("return_softmax: expected False", return_softmax=True)
        self.refused("pdropout: expected a probability", pdropout=1.0)
        self.refused("pdropout: expected a probability", pdropout=-0.1)
        self.refused("sequences of at most 2 tokens, got one of 3", max_seqlen_q=2)
        self.refused(r"alibi_slopes: expected shape \[4\], got \[3\]", alibi_slopes=torch.rand(3))

    def test_tensors(self):
        query, key, value = tensors([(3, 3)])
        self.refused("query, key, value: expected", (query, key[:, :1], value))
        self.refused("query, key, value: expected", (query[:, :3], key, value))
        self.refused("query, key, value: expected", (query[..., 1:], key, value))
        self.refused("query, key, value: expected", (query[0], key, value))
        self.refused("expected one dtype", (query, key.bfloat16(), value), TypeError)
        self.refused(r"out: expected \[3, 4, 10\]", (query, key, value[..., :10]))
        self.refused("out: expected", (query.bfloat16(), key.bfloat16(), value.bfloat16()))
