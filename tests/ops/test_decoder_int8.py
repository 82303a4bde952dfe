"""Decoder layers with INT8 weights, whose inputs are quantized: what the op's other tests leave out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ipex_quant import ops
from ipex_quant.ops import PostOp, reference_decoder
from ipex_quant.ops.decoder import DecoderStructure, decoder_layers, native_arguments

from .test_decoder import DTYPES, INT4, PAGES, W8A8, Stack, changed, check_threads, in_parts


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", W8A8)
def test_has_the_bits_of_its_parts(kind, dtype, rows) -> None:
    stack = Stack(DecoderStructure(), (rows, 1), dtype, scheme=kind, biased=True, sizes=(75, 130))
    (result, caches), (expected, expected_caches) = stack.run(), stack.run(in_parts)
    assert torch.equal(result, expected)
    assert all(map(torch.equal, caches, expected_caches))


@pytest.mark.parametrize("kind", [*W8A8, (W8A8[2], INT4)])
@pytest.mark.parametrize(
    "structure",
    [
        DecoderStructure(),
        DecoderStructure(projections=1, mlp_inputs=1, parallel=True, centered=True, interleaved=True),
        DecoderStructure(mlp_inputs=1, gated=False, activation=PostOp.RELU),
        DecoderStructure(sandwich=True, offset=1.0),
    ],
)
def test_computes_what_is_defined(structure, kind) -> None:
    stack = Stack(structure, (2, 3), biased=True, head_norms=True, scheme=kind)
    result, caches = stack.run()
    expected, expected_caches = stack.run(
        lambda x, *arguments: reference_decoder.decoder_layers(x, stack.quantized, *arguments)
    )
    # One step of a quantized activation, where float32 sums of another order round the other way.
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(caches, expected_caches, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", W8A8)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads, kind) -> None:
    stack = Stack(DecoderStructure(), (13, 1), torch.bfloat16, layers=3, scheme=kind)
    check_threads(stack, threads)


@pytest.mark.parametrize("kind", W8A8)
def test_opcheck(kind) -> None:
    for options in ({}, {"shape": (1, 5), "pages": PAGES}):
        stack = Stack(DecoderStructure(), layers=1, scheme=kind, **options)
        arguments = native_arguments(stack.x, stack.weights, stack.call(), stack.structure)
        torch.library.opcheck(torch.ops.ipex_quant.decoder_layers.default, arguments)


def each(change):
    return lambda tensors: [change(tensor) for tensor in tensors]


def with_value(place: int, value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def with_header(place: int, value: int):
    """The first weight with another byte of its header: magic, out features, then from 8 on in features."""
    return changed("packed", lambda packed: [with_value(place, value)(packed[0]), *packed[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("static_inputs", lambda s: s[:-1]), "static_inputs: expected 7 for each of 2 layers"),
        (changed("static_inputs", each(lambda t: t[:-1])), "static_inputs: expected 82 elements, got 81"),
        (changed("static_inputs", each(lambda t: t[None])), "static_inputs: expected 1 dimensions"),
        (changed("static_inputs", each(lambda t: t.double())), "static_inputs: expected dtype Float"),
        (changed("static_inputs", each(lambda t: t.repeat(2)[::2])), "static_inputs: expected a contiguous tensor"),
        (changed("static_inputs", each(with_value(1, 256))), "static_inputs: expected a zero point of 0..255, got 256"),
        (changed("static_inputs", each(with_value(1, -1))), "expected a zero point of 0..255, got -1"),
        (changed("static_inputs", each(with_value(1, 0.5))), "expected a zero point of 0..255, got 0.5"),
        (changed("static_inputs", each(with_value(1, float("nan")))), "expected a zero point of 0..255, got nan"),
        (changed("perms", lambda p: [torch.arange(80).int(), *[None] * 7]), "perms: expected none with an INT8 weight"),
        (changed("packed", each(lambda t: t[:63])), "packed: too short"),
        (changed("packed", each(lambda t: t[:-1])), r"packed: expected \d+ bytes"),
        (changed("packed", each(lambda t: torch.cat((t, t)))), r"packed: expected \d+ bytes"),
        (with_header(0, 0), "packed: not a packed weight"),
        (with_header(7, 255), "out_features: expected 0 <= out_features < 2"),
        (with_header(8, 81), r"packed: expected \d+ bytes"),
        (with_header(8, 79), "static_inputs: expected 81 elements, got 82"),
        (with_header(15, 255), "expected 0 < in_features < 2"),
        (with_header(20, 1), "packed: weight 0 is not one of 80 input and 64 output features"),
        (changed("biases", lambda b: [torch.zeros(3)] * 14), "biases: expected"),
    ],
)
def test_bad_arguments_write_nothing(change, message) -> None:
    stack = Stack(DecoderStructure(), scheme="static")
    change(stack)
    kept = [cache.clone() for cache in stack.caches]
    with pytest.raises(RuntimeError, match=message):
        decoder_layers(stack.x, stack.weights, stack.call(), stack.structure)
    assert all(map(torch.equal, stack.caches, kept))


def test_a_static_input_of_a_weight_that_is_quantized_alone() -> None:
    stack = Stack(DecoderStructure())
    weights = stack.weights._replace(static_inputs=[torch.ones(82)] * 14)
    with pytest.raises(RuntimeError, match="static_inputs: expected None with a weight-only quantized weight"):
        decoder_layers(stack.x, weights, stack.call(), stack.structure)


def test_a_whole_share_group_is_no_weight() -> None:
    stack = Stack(DecoderStructure(), scheme="per token")
    group = ops.pack_int8([weight.weight for weight in stack.quantized[:3]])
    weights = stack.weights._replace(packed=[group.data, *stack.weights.packed[1:]])
    with pytest.raises(RuntimeError, match=r"packed: expected \d+ bytes of 1 weights"):
        decoder_layers(stack.x, weights, stack.call(), stack.structure)


def test_compute_modes_of_other_weights_have_no_effect() -> None:
    stack = Stack(DecoderStructure(), scheme="static")
    expected = stack.run()[0]
    stack.structure = dataclasses.replace(stack.structure, lowp_mode=3, act_quant_mode=2)
    assert torch.equal(stack.run()[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("static_inputs", lambda s: s[:-1]), "static_inputs: expected 7 for each of 2 layers, got 13"),
        (changed("static_inputs", each(lambda t: t[None])), r"static_inputs: expected \[2 \+ K\]"),
    ],
)
def test_bad_shapes_are_refused_without_data(change, message) -> None:
    stack = Stack(DecoderStructure(), scheme="static")
    change(stack)
    arguments = native_arguments(stack.x, stack.weights, stack.call(), stack.structure)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ipex_quant.decoder_layers(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), arguments))
