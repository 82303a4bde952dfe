"""IPEX's calling convention: tuples of four tensors a layer as past, arguments by position, tuples back."""

import copy
import io

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.llm.cache.past import Past
from ipex_quant.quantization import (
    WoqWeightDtype,
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

from .conftest import build

IDS = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(9).unsqueeze(0)


def empty_past(layers=2, heads=1, size=1):
    """Tuples without tokens, as scripts make them."""
    values = torch.zeros(1, heads, 1, size)
    return [
        (torch.zeros(1, 0, 0, 1, dtype=torch.long), values, values, torch.zeros(2048, 4, dtype=torch.long))
        for _ in range(layers)
    ]


def optimized(name, dtype=torch.float):
    model = build(name)
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)
    return ipex.llm.optimize(model, dtype=dtype, quantization_config=mapping)


def call(model, start, stop, past):
    """Logits and past of the tokens from `start` to `stop`."""
    mask = torch.ones(1, stop)  # float, as in IPEX's scripts
    return model(IDS[:, start:stop], mask, past, POSITIONS[:, start:stop])[:2]


def close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["llama", "opt", "gpt2", "qwen3_moe"])
def model(request):
    return optimized(request.param)


class TestCalls:
    def test_tuples_go_in_and_come_out(self, model):
        expected = model(IDS).logits
        logits, past = call(model, 0, 5, tuple(empty_past(heads=4, size=16)))
        close(logits, expected[:, :5])
        assert isinstance(past, tuple)
        assert [len(layer) for layer in past] == [4, 4]
        assert past[0][0].shape[-2] == 5
        assert past[0][3].shape == (2048, 4)
        for start in range(5, 9):
            logits, past = call(model, start, start + 1, past)
            close(logits, expected[:, start : start + 1])

    def test_an_older_past_goes_on_from_where_it_was(self, model):
        expected = model(IDS).logits
        first = call(model, 0, 5, empty_past())[1]
        call(model, 5, 9, first)
        assert first[0][0].shape[-2] == 5
        close(call(model, 5, 9, first)[0], expected[:, 5:])

    def test_plain_tuples_with_tokens_fill_a_native_cache(self, model):
        past = tuple(tuple(layer) for layer in call(model, 0, 5, empty_past())[1])
        logits, past = call(model, 5, 9, past)
        close(logits, model(IDS).logits[:, 5:])
        assert isinstance(past, Past)
        assert type(past.cache.layers[0]).__name__ == "NativeLayer"

    def test_by_name_and_in_another_order(self, model):
        expected = model(IDS).logits
        arguments = {"attention_mask": torch.ones(1, 9), "past_key_values": empty_past()}
        close(model(IDS, **arguments).logits, expected)
        close(model(IDS, empty_past(), torch.ones(1, 9)).logits, expected)
        close(model(IDS, torch.ones(1, 9), POSITIONS, empty_past()).logits, expected)
        close(model(model.get_input_embeddings()(IDS), torch.ones(1, 9), empty_past()).logits, expected)

    def test_bfloat16(self):
        model = optimized("llama", torch.bfloat16)
        past = call(model, 0, 5, empty_past())[1]
        assert past[0][1].dtype == torch.bfloat16
        torch.testing.assert_close(call(model, 5, 9, tuple(map(tuple, past)))[0], call(model, 5, 9, past)[0])

    def test_tuples_of_results(self, model):
        for options in ({"return_dict": False}, {}):
            result = model(IDS, torch.ones(1, 9), empty_past(), POSITIONS, **options)
            model.config.torchscript = True
            assert type(result) is tuple
            assert isinstance(result[1], Past)

    def test_copies_take_tuples(self, model):
        close(call(copy.deepcopy(model), 0, 9, empty_past())[0], model(IDS).logits)

    def test_other_calls_are_as_before(self, model):
        output = model(IDS, attention_mask=torch.ones(1, 9))
        assert not isinstance(output[CACHE], tuple)
        assert output[CACHE].get_seq_length() == 9


def test_calibration_by_position():
    model = build("llama")
    mapping = get_smooth_quant_qconfig_mapping()
    example = (IDS, torch.ones(1, 9), tuple(empty_past()), POSITIONS)
    prepared = prepare(ipex.llm.optimize(model, quantization_config=mapping), mapping, example_inputs=example)
    prepared(*example)
    converted = convert(prepared)
    assert type(converted.lm_head).__name__ == "Int8Linear"
    logits, past = call(converted, 0, 5, empty_past())
    torch.testing.assert_close(call(converted, 5, 9, past)[0], converted(IDS).logits[:, 5:], rtol=0.05, atol=0.05)
    keywords = prepare(model, mapping, example_kwarg_inputs={"input_ids": IDS})
    keywords(IDS)
    torch.testing.assert_close(logits, convert(keywords)(IDS[:, :5]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (empty_past(3), "expected a tuple for each of 2 layers, got 3"),
        ([layer * 2 for layer in empty_past()], r"expected tensors \(seq_info"),
        ([(1, 2, 3, 4)] * 2, "int"),
    ],
)
def test_tuples_that_do_not_fit(past, message):
    with pytest.raises(ValueError, match=message):
        optimized("llama")(IDS, torch.ones(1, 9), past)


def test_arguments_that_do_not_fit():
    model = optimized("llama")
    with pytest.raises(TypeError, match="pass the others by name"):
        model(IDS, IDS, IDS, IDS, empty_past())
    with pytest.raises(TypeError, match="expected tensors"):
        model(IDS, "mask", empty_past())
    first = call(model, 0, 5, empty_past())[1]
    second = call(model, 5, 9, first)[1]
    first.resumed()
    with pytest.raises(ValueError, match="a call went back to 5"):
        call(model, 0, 1, second)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_call_takes_any_batch_and_length(model):
    expected = model(IDS).logits
    example = (IDS[:, :6], torch.ones(1, 6), tuple(empty_past(heads=4, size=16)), POSITIONS[:, :6])
    graph = torch.jit.freeze(torch.jit.trace(model, example, strict=False, check_trace=False).eval())
    file = io.BytesIO()
    torch.jit.save(graph, file)
    file.seek(0)
    graph = torch.jit.freeze(torch.jit.load(file).eval())
    logits, past = call(graph, 0, 5, tuple(empty_past()))
    close(logits, expected[:, :5])
    for start in range(5, 9):
        logits, past = call(graph, start, start + 1, past)
        close(logits, expected[:, start : start + 1])
    batch = graph(IDS.repeat(3, 1), torch.ones(3, 9), tuple(empty_past()), POSITIONS.repeat(3, 1))[0]
    close(batch, expected.repeat(3, 1, 1))
