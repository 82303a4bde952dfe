"""Decoder layers in one call: the bits of their parts, the plain-torch definition, and bad arguments."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Collection, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map_only

from ipex_quant import ops
from ipex_quant.numerics.int8 import quantize_per_channel
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import PostOp, reference_decoder
from ipex_quant.ops.decoder import (
    MAX_TOKENS,
    DecoderCall,
    DecoderStructure,
    DecoderWeights,
    decoder_layers,
    native_arguments,
)
from ipex_quant.ops.reference_decoder import Int8Weight
from ipex_quant.ops.woq_header import read_header

from .test_attention import DTYPES, generator, normal
from .weights import shuffle_features

INT4 = WeightScheme(WoqWeightDtype.INT4, False, 32)
INT8_MODE = {"lowp_mode": WoqLowpMode.INT8, "act_quant_mode": WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM}
CAPACITY = 20
BLOCKS, PAGE = 9, 4
W8A8 = ("static", "static for each weight", "per token")
"""Kinds of INT8 weights, where a scheme is expected: how their input is quantized."""


def paged(lengths: Sequence[int], new: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Block tables, lengths and starts of sequences that have no block in common, the last of whose tokens are new."""
    width = max(-(-length // PAGE) for length in lengths)
    blocks = torch.randperm(len(lengths) * width, generator=generator(2)).int()
    return blocks.view(len(lengths), width), torch.tensor(lengths), torch.tensor([0, *new]).cumsum(0)


PAGES = paged([5, 8, 11], [1, 3, 1])


def in_turn(scheme: WeightScheme | str | Sequence[WeightScheme | str]) -> Sequence[WeightScheme | str]:
    return [scheme] if isinstance(scheme, (str, WeightScheme)) else scheme


def pack(weights: Sequence[QuantizedWeight | Int8Weight], each: int) -> list[ops.PackedWeight | ops.PackedInt8]:
    """The weights of layers that have `each`; INT8 weights of a layer are views of one buffer, as in a share group."""
    packed: list[ops.PackedWeight | ops.PackedInt8] = []
    for first in range(0, len(weights), each):
        layer = weights[first : first + each]
        groups: dict[int, list[int]] = {}
        for i, weight in enumerate(layer):
            if isinstance(weight, Int8Weight):
                groups.setdefault(weight.weight.shape[1], []).append(i)
        views = {}
        for places in groups.values():
            group = ops.pack_int8([layer[i].weight for i in places])
            views |= {i: group.member(member) for member, i in enumerate(places)}
        packed += [views[i] if i in views else ops.pack_weight(weight) for i, weight in enumerate(layer)]
    return packed


def static_inputs(
    kinds: Sequence[WeightScheme | str], inputs: Sequence[int], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Scale, zero point and multipliers of static inputs, one tensor for each input or, if so named, each weight."""
    found: list[torch.Tensor | None] = []
    for i, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
        place = i % len(inputs)
        if not isinstance(kind, str) or kind == "per token":
            found.append(None)
        elif kind == "static" and place and inputs[place] == inputs[place - 1] and kinds[i - 1] == kind:
            found.append(found[-1])
        else:
            factors = torch.rand(weight.shape[1], generator=generator(i)) + 0.5
            found.append(torch.cat((torch.tensor([0.03, 110 + i]), factors / 0.03)))
    return found if any(each is not None for each in found) else []


class Stack:
    """Layers of random weights, and what they are called with."""

    def __init__(
        self,
        structure: DecoderStructure,
        shape: tuple[int, int] = (1, 1),
        dtype: torch.dtype = torch.float32,
        layers: int = 2,
        scheme: WeightScheme | str | Sequence[WeightScheme | str] = INT4,
        biased: bool = False,
        head_norms: bool = False,
        int8: bool = False,
        start: int = 5,
        heads: tuple[int, int, int] = (4, 2, 16),
        ordered: Collection[int] = (),
        rotary_dim: int = 16,
        pages: Sequence[torch.Tensor] = (),
        sizes: tuple[int, int] = (80, 72),
    ) -> None:
        """`sizes` are those of the hidden states and within the MLP.

        Inputs in `ordered` (of 4: projections, their output, MLP, its output) have weights in act-order.

        Several schemes are those of the weights in turn; one of `W8A8` is that of INT8 weights.
        """
        query, kv, dim = heads
        (features, inner), width = sizes, (query + 2 * kv) * dim
        projections = [query * dim, kv * dim, kv * dim] if structure.projections == 3 else [width]
        joined = structure.gated and structure.mlp_inputs == 1
        shapes = [(n, features) for n in projections] + [(features, query * dim)]
        shapes += [(2 * inner if joined else inner, features)] * structure.mlp_inputs + [(features, inner)]
        weights = [normal(*shape, seed=i) * 0.1 for i, shape in enumerate(shapes * layers)]
        kinds = list(itertools.islice(itertools.cycle(in_turn(scheme)), len(weights)))
        self.quantized = [
            Int8Weight(quantize_per_channel(weight)) if own in W8A8 else ops.quantize_weight(weight, own)
            for weight, own in zip(weights, kinds, strict=True)
        ]
        self.inputs = [0] * len(projections) + [1] + [2] * structure.mlp_inputs + [3]  # of the weights of a layer
        for i, weight in enumerate(self.quantized):
            layer, place = divmod(i, len(self.inputs))
            if self.inputs[place] in ordered:  # one order for all that share an input
                self.quantized[i] = shuffle_features(weight, seed=4 * layer + self.inputs[place])
        packed = pack(self.quantized, len(self.inputs))
        firsts = [layer * len(self.inputs) + self.inputs.index(i) for layer in range(layers) for i in range(4)]
        norms = 4 if structure.sandwich else 2
        self.weights = DecoderWeights(
            packed=[weight.data for weight in packed],
            perms=[packed[first].perm for first in firsts] if ordered else [],
            static_inputs=static_inputs(kinds, self.inputs, weights),
            biases=[normal(len(w), seed=i) if i % 3 else None for i, w in enumerate(weights)] if biased else [],
            norms=[1 + 0.1 * normal(features, dtype=dtype, seed=i) for i in range(norms * layers)],
            norm_biases=[normal(features, dtype=dtype, seed=i) for i in range(norms * layers)] if biased else [],
            head_norms=[1 + 0.1 * normal(dim, dtype=dtype, seed=i) for i in range(2 * layers if head_norms else 0)],
        )
        if biased and not structure.centered:
            self.weights.norm_biases.clear()
        self.structure = dataclasses.replace(structure, scale=dim**-0.5)
        self.x = normal(*shape, features, dtype=dtype)
        angles = normal(1, shape[1], rotary_dim // 2, seed=3)
        self.tables, self.rotary_dim = (angles.cos(), angles.sin()), rotary_dim
        size = (BLOCKS, kv, PAGE, dim) if pages else (shape[0], kv, CAPACITY, dim)
        self.caches = [normal(*size, dtype=dtype, seed=i) for i in range(2 * layers)]
        if int8:
            codes = [ops.reference_attention.quantize_token(cache) for cache in self.caches]
            factors = 2.0 ** torch.randint(-2, 3, (kv, dim), generator=torch.Generator().manual_seed(5))
            self.caches = []
            for i in range(layers):
                keys_and_values, scales = zip(*codes[2 * i : 2 * i + 2], strict=True)
                self.caches += [*keys_and_values, *scales, *([] if pages else [factors])]
        self.starts, self.pages = [start] * layers, pages

    def call(self, **options) -> DecoderCall:
        return DecoderCall(*self.tables, self.rotary_dim, self.caches, self.starts, pages=self.pages, **options)

    def run(self, function=decoder_layers, *first, **options):
        """The result and the caches after it."""
        caches = [cache.clone() for cache in self.caches]
        call = self.call(**options)._replace(caches=caches)
        return function(self.x, *first, self.weights, call, self.structure), caches


def packed_int8(data: torch.Tensor) -> ops.PackedInt8 | None:
    magic, out_features, in_features = struct.unpack("4siq", bytes(data[:16].tolist()))
    return ops.PackedInt8(data, (out_features,), in_features) if magic == b"II82" else None


def quantize(x: torch.Tensor, static_input: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    if static_input is None:
        return ops.quantize_activation_per_token(x)
    scale, zero_point, multiplier = static_input.tensor_split((1, 2))
    return ops.quantize_activation(x, multiplier.clone(), int(zero_point)), scale, zero_point.int()


def in_parts(x, weights, call, structure):  # what the lean decoder calls where one call does not do
    caches, starts = call.caches, call.starts
    modes, eps = (structure.lowp_mode, structure.act_quant_mode), structure.eps
    none = [None] * len(weights.packed)
    linears = iter(zip(weights.packed, weights.biases or none, weights.static_inputs or none, strict=True))
    norms = list(zip(weights.norms, weights.norm_biases or [None] * len(weights.norms), strict=True))
    each, perms = len(caches) // len(starts), weights.perms or [None] * 4 * len(starts)
    inputs = [0] * structure.projections + [1] + [2] * structure.mlp_inputs + [3]
    orders = iter([perms[4 * layer + i] for layer in range(len(starts)) for i in inputs])

    def linear(value, post_op=PostOp.NONE, *others):
        data, bias, static_input = next(linears)
        order = next(orders)
        if int8 := packed_int8(data):
            return ops.int8_linear(*quantize(value, static_input), int8, bias, value.dtype, post_op, others)[0]
        return ops.woq_linear(value, data, read_header(data).out_features, bias, order, *modes, post_op, others)

    def raised(weight):
        return weight.float() + structure.offset if structure.offset and weight is not None else weight

    def norm_by(value, weight, bias=None):
        bias = bias.float() if structure.offset and bias is not None else bias
        if structure.centered:
            return ops.layer_norm(value, raised(weight), bias, eps)
        return ops.rms_norm(value, raised(weight), eps)

    def norm(value):
        return norm_by(value, *norms.pop(0))

    for i, start in enumerate(starts):
        normed, cache = norm(x), caches[i * each : (i + 1) * each]
        projected = torch.cat([linear(normed) for _ in range(structure.projections)], -1)
        if weights.head_norms:
            kv_heads, dim = cache[0].shape[1], cache[0].shape[3]
            query, key, value = projected.unflatten(-1, (-1, dim)).tensor_split((-2 * kv_heads, -kv_heads), 2)
            heads = zip((query, key), weights.head_norms[2 * i :], strict=False)
            projected = torch.cat([*(norm_by(a.contiguous(), b) for a, b in heads), value], 2).flatten(2)
        options = {"rotary_dim": call.rotary_dim, "interleaved": structure.interleaved, "scale": structure.scale}
        options |= {"softcap": structure.softcap, "alibi": call.alibi}
        if call.pages:
            arguments = (*cache[:2], call.pages, *cache[2:])
            attended = ops.paged_rope_attention(projected[0], call.cos, call.sin, *arguments, **options)[None]
        else:
            options |= {"mask": call.mask, "start": start, "key_factors": cache[4] if len(cache) > 4 else None}
            attended = ops.fused_rope_attention(projected, call.cos, call.sin, *cache[:4], **options)
        if structure.sandwich:
            second, after_attention, after_mlp = norms[:3]
            del norms[:3]
            attended = x + norm_by(linear(attended), *after_attention)
            normed = norm_by(attended, *second)
        else:
            attended = linear(attended) if structure.parallel else linear(attended, PostOp.ADD, x)
            normed = norm(x if structure.parallel else attended)
        if not structure.gated:
            inner = linear(normed, structure.activation)
        elif structure.mlp_inputs == 2:
            inner = linear(normed, structure.activation)
            inner = linear(normed, PostOp.MUL, inner)
        else:
            inner = torch.ops.ipex_quant.gated_product_halves(linear(normed), int(structure.activation))
        if structure.sandwich:
            x = attended + norm_by(linear(inner), *after_mlp)
        elif structure.parallel:
            x = linear(inner, PostOp.ADD_ADD, attended, x)
        else:
            x = linear(inner, PostOp.ADD, attended)
    return x


structures = st.builds(
    DecoderStructure,
    projections=st.sampled_from([1, 3]),
    mlp_inputs=st.sampled_from([1, 2]),
    activation=st.sampled_from([PostOp.GELU, PostOp.NEW_GELU, PostOp.SILU]),
    parallel=st.booleans(),
    sandwich=st.booleans(),
    centered=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    interleaved=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
)
modes = st.sampled_from(
    [
        {},
        {"lowp_mode": WoqLowpMode.BF16},
        *({"lowp_mode": WoqLowpMode.INT8, "act_quant_mode": m} for m in WoqActQuantMode if m != WoqActQuantMode.NONE),
    ]
)
INT6 = WeightScheme(WoqWeightDtype.INT6, True, 16)
schemes = st.sampled_from(
    [
        *(INT4, WeightScheme(WoqWeightDtype.INT8, True, -1), WeightScheme(WoqWeightDtype.NF4, True, 16)),
        (INT4, INT4, INT6),
        (INT6, INT4, WeightScheme(WoqWeightDtype.FP8, True, 32)),
        *(*W8A8, (W8A8[2], INT4), (W8A8[0], W8A8[0], INT6, INT4)),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    structure=structures,
    mode=modes,
    scheme=schemes,
    shape=st.sampled_from([(1, 1), (3, 1), (1, 3), (2, 4), (9, 1), (1, 15), (64, 1), PAGES]),
    dtype=st.sampled_from(DTYPES),
    plain=st.booleans(),
    biased=st.booleans(),
    head_norms=st.booleans(),
    int8=st.booleans(),
    masked=st.booleans(),
    alibi=st.booleans(),
    ordered=st.sets(st.integers(0, 3)),
    rotary_dim=st.sampled_from([0, 4, 16]),
    sizes=st.sampled_from([(80, 72), (75, 130), (33, 7)]),
)
def test_has_the_bits_of_its_parts(
    structure, mode, scheme, shape, dtype, plain, biased, head_norms, int8, masked, alibi, ordered, rotary_dim, sizes
) -> None:
    structure = dataclasses.replace(structure, **mode)
    structure = dataclasses.replace(structure, parallel=structure.parallel and not structure.sandwich)
    if plain:
        structure = dataclasses.replace(structure, gated=False, mlp_inputs=1, activation=PostOp.RELU)
    pages, shape = (shape, (1, int(shape[2][-1]))) if shape is PAGES else ((), shape)
    if any(kind in W8A8 for kind in in_turn(scheme)):
        ordered = ()  # INT8 weights have no order of features
    kinds = {"pages": pages, "biased": biased, "head_norms": head_norms, "int8": int8, "ordered": ordered}
    stack = Stack(structure, shape, dtype, scheme=scheme, rotary_dim=rotary_dim, sizes=sizes, **kinds)
    options = {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.3])} if alibi else {}
    if masked and not pages:
        options["mask"] = torch.rand(shape[0], 1, 1, 5 + shape[1], generator=generator(4)) < 0.8
    result, caches = stack.run(**options)
    expected, expected_caches = stack.run(in_parts, **options)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
    for got, wanted in zip(caches, expected_caches, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("int8", [False, True])
def test_paged_sequences_have_the_bits_of_each_alone(int8) -> None:
    """Blocks that sequences share hold the same tokens: here the first one of all three."""
    pages = paged([6, 9, 12], [1, 1, 1])
    pages[0][:, 0] = pages[0][0, 0]
    stack = Stack(DecoderStructure(**INT8_MODE), (1, 3), int8=int8, pages=pages)
    together, x = stack.run()[0], stack.x
    tables = stack.tables
    for i in range(3):
        stack.x, stack.tables = x[:, i : i + 1], tuple(table[:, i : i + 1] for table in tables)
        stack.pages = pages[0][i : i + 1], pages[1][i : i + 1], torch.tensor([0, 1])
        assert torch.equal(stack.run()[0], together[:, i : i + 1])


@pytest.mark.parametrize("ordered", [(), (1,), range(4)])
@pytest.mark.parametrize("mode", [{}, INT8_MODE])
@pytest.mark.parametrize(
    "structure",
    [
        DecoderStructure(),
        DecoderStructure(projections=1, mlp_inputs=1, parallel=True, centered=True, interleaved=True),
        DecoderStructure(mlp_inputs=1, gated=False, activation=PostOp.RELU),
        DecoderStructure(sandwich=True, offset=1.0),
    ],
)
def test_computes_what_is_defined(structure, mode, ordered) -> None:
    rotary_dim = 8 if structure.interleaved else 16
    stack = Stack(
        dataclasses.replace(structure, **mode),
        (2, 3),
        biased=True,
        head_norms=True,
        ordered=ordered,
        rotary_dim=rotary_dim,
    )
    result, caches = stack.run()

    def expected_layers(x, *arguments):
        return reference_decoder.decoder_layers(x, stack.quantized, *arguments)

    expected, expected_caches = stack.run(expected_layers)
    tolerance = 0.05 if mode else 1e-4  # one step of a quantized activation
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches, expected_caches, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("int8", [False, True])
def test_computes_what_is_defined_over_pages(int8) -> None:
    stack = Stack(DecoderStructure(), (1, 5), head_norms=True, int8=int8, pages=PAGES)
    result, caches = stack.run()
    expected, expected_caches = stack.run(
        lambda x, *arguments: reference_decoder.decoder_layers(x, stack.quantized, *arguments)
    )
    tolerance = 0.05 if int8 else 1e-4
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches, expected_caches, rtol=tolerance, atol=1 if int8 else tolerance)


def check_threads(stack: Stack, threads: int) -> None:
    """The bits do not depend on the number of threads."""
    expected = stack.run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            result = stack.run()
            assert torch.equal(result[0], expected[0])
            assert all(map(torch.equal, result[1], expected[1]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("rows", [5, 40])
def test_any_number_of_threads_gives_the_same(threads, rows) -> None:
    stack = Stack(DecoderStructure(**INT8_MODE), (rows, 1), torch.bfloat16, layers=3)
    check_threads(stack, threads)


@pytest.mark.parametrize("place", range(4))
def test_features_in_another_order_are_read_in_theirs(place) -> None:
    """A permuted input of a permuted weight gives the sums of both as they were, up to the order of addition."""
    stack = Stack(DecoderStructure(), ordered=[place])
    expected, _ = stack.run(lambda x, *rest: reference_decoder.decoder_layers(x, stack.quantized, *rest))
    torch.testing.assert_close(stack.run()[0], expected, rtol=1e-4, atol=1e-4)
    stack.weights.perms[place] = None
    assert not torch.allclose(stack.run()[0], expected, rtol=1e-2, atol=1e-2)


def test_no_token_gives_none() -> None:
    assert Stack(DecoderStructure(), (0, 1)).run()[0].shape == (0, 1, 80)


def changed(name: str, value: object):
    def change(stack: Stack) -> None:
        if hasattr(stack, name):
            setattr(stack, name, value(getattr(stack, name)))
        else:
            stack.weights = stack.weights._replace(**{name: value(getattr(stack.weights, name))})

    return change


def with_structure(**options: object):
    def change(stack: Stack) -> None:
        stack.structure = dataclasses.replace(stack.structure, **options)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("x", lambda x: x.repeat(1, MAX_TOKENS + 1, 1)), f"at most {MAX_TOKENS} tokens"),
        (changed("x", lambda x: x[0]), "x: expected shape"),
        (changed("x", lambda x: x.double()), "expected float32"),
        (changed("x", lambda x: x[..., :64]), "in features"),
        (changed("packed", lambda p: p[:-1]), "packed: expected 7 for each of 2 layers"),
        (changed("packed", lambda p: [t[:-1] for t in p]), "packed: expected"),
        (changed("packed", lambda p: [p[1], p[0], *p[2:]]), "expected projections to 4, 2 and 2 heads"),
        (changed("packed", lambda p: [*p[:3], p[6], *p[4:]]), "features"),
        (changed("packed", lambda p: [*p[:4], p[0], *p[5:]]), "features"),
        (changed("biases", lambda b: [torch.zeros(3)] * 14), "biases: expected"),
        (changed("perms", lambda b: [None] * 7), "perms: expected 4"),
        (changed("perms", lambda b: [torch.full((80,), 80).int(), *[None] * 7]), "perms"),
        (changed("norms", lambda n: n[:2]), "norms: expected 2"),
        (changed("norms", lambda n: [t[:3] for t in n]), "norms: expected shape"),
        (changed("norms", lambda n: [t.half() for t in n]), "norms: expected float32"),
        (changed("norm_biases", lambda n: [torch.zeros(3)] * 4), "norm_biases: expected shape"),
        (changed("head_norms", lambda n: [torch.zeros(3)] * 4), "head_norms: expected shape"),
        (changed("caches", lambda c: c[:3]), "caches: expected 2"),
        (changed("caches", lambda c: [t[:, :1] for t in c]), "expected"),
        (changed("caches", lambda c: [t.half() for t in c]), "expected the dtype"),
        (changed("starts", lambda s: [CAPACITY] * 2), "do not fit a cache"),
        (changed("starts", lambda s: [-1, 0]), "do not fit a cache"),
        (changed("starts", lambda s: []), "starts"),
        (changed("tables", lambda t: (t[0], t[1][:, :, :3])), "sin: expected"),
        (with_structure(projections=2), "projections: expected 1 or 3"),
        (with_structure(mlp_inputs=3), "mlp_inputs"),
        (with_structure(gated=False), "mlp_inputs"),
        (with_structure(sandwich=True), "norms: expected 4"),
        (with_structure(sandwich=True, parallel=True), "parallel: expected false in a sandwich"),
        (with_structure(activation=PostOp.RELU), "activation"),
        (with_structure(activation=9), "activation"),
        (changed("rotary_dim", lambda _: 18), "rotary_dim"),
        (with_structure(lowp_mode=5), "lowp_mode"),
        (with_structure(lowp_mode=3), "act_quant_mode"),
        (with_structure(scale=float("nan")), "scale"),
    ],
)
def test_bad_arguments_write_nothing(change, message) -> None:
    stack = Stack(DecoderStructure())
    change(stack)
    kept = [cache.clone() for cache in stack.caches]
    with pytest.raises(RuntimeError, match=message):
        decoder_layers(stack.x, stack.weights, stack.call(), stack.structure)
    assert all(map(torch.equal, stack.caches, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("pages", lambda p: p[:2]), "pages: expected block tables, lengths and starts of queries, got 2"),
        (changed("pages", lambda p: (p[0] + 1, *p[1:])), r"block_tables: expected values in 0\.\.8, got 9"),
        (
            changed("pages", lambda p: (p[0], p[1] - 5, p[2])),
            "lengths: expected at least the 1 new tokens of sequence 0",
        ),
        (changed("pages", lambda p: (*p[:2], p[2] + 1)), "query_starts: expected numbers that rise"),
        (changed("caches", lambda c: [c[0], c[1], *(t[:8] for t in c[2:])]), r"expected values in 0\.\.7, got 8"),
        (changed("caches", lambda c: [*c[:2], *(t[:, :, :3] for t in c[2:])]), "key_cache: expected blocks of 4"),
        (changed("x", lambda x: x.view(5, 1, -1)), "x: expected a batch of 1 with pages"),
    ],
)
def test_bad_pages_write_nothing(change, message) -> None:
    stack = Stack(DecoderStructure(), (1, 5), pages=PAGES)
    change(stack)
    kept = [cache.clone() for cache in stack.caches]
    with pytest.raises(RuntimeError, match=message):
        decoder_layers(stack.x, stack.weights, stack.call(), stack.structure)
    assert all(map(torch.equal, stack.caches, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("x", lambda x: x[0]), r"x: expected \[B, L, K\]"),
        (changed("packed", lambda p: p[:-1]), "packed: expected 7 for each of 2 layers, got 13"),
        (changed("biases", lambda b: [None]), "biases: expected 7 for each of 2 layers, got 1"),
        (changed("perms", lambda b: [None] * 7), "perms: expected 4"),
        (changed("norms", lambda n: [t[:3] for t in n]), r"norms: expected \[80\], got \[3\]"),
        (changed("norm_biases", lambda n: [None] * 3), "norm_biases: expected 2"),
        (changed("head_norms", lambda n: [*n, torch.zeros(16)]), "head_norms: expected 2"),
        (changed("caches", lambda c: c[:3]), "caches: expected 2, 4 or 5 for each"),
        (changed("caches", lambda c: [t[0] for t in c]), r"caches: expected \[B, Hkv, capacity, D\]"),
        (changed("starts", lambda s: []), "starts: expected one"),
        (changed("tables", lambda t: (t[0][0], t[1])), "cos: expected"),
    ],
)
def test_bad_shapes_are_refused_without_data(change, message) -> None:
    stack = Stack(DecoderStructure())
    change(stack)
    arguments = native_arguments(stack.x, stack.weights, stack.call(), stack.structure)
    meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ipex_quant.decoder_layers(*meta)


def test_opcheck() -> None:
    for stack in (Stack(DecoderStructure(), layers=1), Stack(DecoderStructure(), (1, 5), layers=1, pages=PAGES)):
        arguments = native_arguments(stack.x, stack.weights, stack.call(), stack.structure)
        torch.library.opcheck(torch.ops.ipex_quant.decoder_layers.default, arguments)


def test_compiled_code_writes_to_the_caches_themselves_wherever_they_start() -> None:
    stack = Stack(DecoderStructure(), int8=True)

    def step(caches: list[torch.Tensor], start: int) -> torch.Tensor:
        call = stack.call()._replace(caches=caches, starts=[start] * 2)
        return decoder_layers(stack.x, stack.weights, call, stack.structure)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    caches, expected = ([cache.clone() for cache in stack.caches] for _ in range(2))
    with torch.no_grad():
        result, (code,) = run_and_get_code(compiled, caches, 5)
        assert torch.equal(result, step(expected, 5))
        counter.clear()
        for start in range(6, 9):
            assert torch.equal(compiled(caches, start), step(expected, start))
            assert all(map(torch.equal, caches, expected))
    assert not counter.frame_count
    assert "ipex_quant.decoder_layers" in code
    assert not any(word in code.split("def call(")[1] for word in ("clone", "copy", "empty_strided"))


def test_indices_in_the_memory_of_a_cache_are_refused() -> None:
    """They would be read after the call itself has overwritten them."""
    stack = Stack(DecoderStructure(), int8=False)
    features = stack.x.shape[2]
    cache = stack.caches[1]
    perm = cache.view(torch.int32).view(-1)[7 : 7 + features]
    perm.copy_(torch.arange(features, dtype=torch.int32))
    perms = [torch.arange(features, dtype=torch.int32), None, None, None, perm, None, None, None]
    weights = stack.weights._replace(perms=perms)
    with pytest.raises(RuntimeError, match="perms: expected memory of their own"):
        decoder_layers(stack.x, weights, stack.call(), stack.structure)
    perms[4] = perm.clone()
    decoder_layers(stack.x, weights, stack.call(), stack.structure)
