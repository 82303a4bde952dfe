import math

import pytest
import torch

from ipex_quant.llm import functional, modules

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
H, KV, D = 4, 2, 24
SCALE = 3.0


def states(batch, length, dtype=torch.float32, value_dim=D):
    shapes = (batch, length, H, D), (batch, length, KV, D), (batch, length, KV, value_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attend(given, past=None, **options):
    """The result as ``[B, L, H, D]``, and what to go on with."""
    output, weights, past = functional.indirect_access_kv_cache_attention(*given, SCALE, past, **options)
    assert weights is None
    return output.transpose(1, 2), past


def tokens_of(past):
    return past[0].size(-2)


def reorder_cache(past_key_values, beam_idx):
    """As the API document has it."""
    if len(past_key_values[0]) == 4 and past_key_values[0][0].shape[-1] == 1:
        for layer_past in past_key_values:
            layer_past[3][layer_past[0].size(-2) - 1] = beam_idx
        return past_key_values
    raise AssertionError


class Copies:
    """The same by moving keys and values, one sequence or beam at a time."""

    def __init__(self, dense, causal=True):
        self.dense, self.causal, self.past = dense, causal, None

    def __call__(self, given, masks=None, alibi=None):
        query, key, value = given
        if self.past is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(self.past, (key, value), strict=True))
        self.past = key, value
        results = []
        for i in range(len(query)):
            mask = None if masks is None else masks[i].expand(H, query.shape[1], key.shape[1])
            results.append(self.dense(query[i], key[i], value[i], 1 / SCALE, self.causal, mask=mask, alibi=alibi))
        return torch.stack(results).to(query.dtype)

    def reorder(self, beams):
        self.past = tuple(cache[beams] for cache in self.past)


@pytest.fixture
def copies(dense):
    return Copies(dense)


@pytest.mark.parametrize("dtype", TOLERANCE)
class TestDecoding:
    def test_prompt_tokens_and_chunks(self, copies, dtype):
        past = None
        for length in (5, 1, 1, 3, 1):
            given = states(3, length, dtype)
            result, past = attend(given, past)
            torch.testing.assert_close(result, copies(given), **TOLERANCE[dtype])
        assert tokens_of(past) == 11

    def test_beams_find_their_tokens(self, copies, dtype):
        past = None
        for length in (4, 1, 1, 1, 2, 1):
            given = states(6, length, dtype)
            result, past = attend(given, past)
            torch.testing.assert_close(result, copies(given), **TOLERANCE[dtype])
            beams = torch.cat((torch.randint(0, 3, (3,)), torch.randint(3, 6, (3,))))
            reorder_cache((past,), beams)
            copies.reorder(beams)

    def test_prompt_is_stored_once_for_its_beams(self, copies, dtype):
        first = (torch.zeros(1, 0, 0, 1, dtype=torch.long), *torch.zeros(2, 1, 1, 1, 1), torch.zeros(64, 6).long())
        prompt = states(2, 4, dtype)
        result, past = attend(prompt, first)
        torch.testing.assert_close(result, copies(prompt), **TOLERANCE[dtype])
        chunk = states(2, 3, dtype)
        result, past = attend(chunk, past)
        torch.testing.assert_close(result, copies(chunk), **TOLERANCE[dtype])
        copies.reorder(torch.arange(6) // 3)
        assert past[1].shape[1] == 6
        for beams in ([1, 1, 0, 5, 3, 3], [2, 1, 0, 3, 4, 5], [0, 0, 0, 4, 4, 5]):
            reorder_cache((past,), torch.tensor(beams))
            copies.reorder(beams)
            given = states(6, 1, dtype)
            result, past = attend(given, past)
            torch.testing.assert_close(result, copies(given), **TOLERANCE[dtype])


class TestOptions:
    def test_mask_is_added(self, copies):
        past = None
        for length, total in ((4, 4), (1, 5)):
            mask = torch.randn(2, 1, length, total)
            mask[0, ..., 1] = torch.finfo(torch.float32).min
            given = states(2, length)
            result, past = attend(given, past, attention_mask=mask)
            torch.testing.assert_close(result, copies(given, mask))

    def test_bool_mask_hides(self, copies):
        given, mask = states(2, 4), torch.tensor([[True, True, True, True], [False, True, True, True]])
        result, _ = attend(given, attention_mask=mask[:, None, None])
        added = torch.zeros(2, 1, 1, 4).masked_fill(~mask[:, None, None], -math.inf)
        torch.testing.assert_close(result[:, 1:], copies(given, added)[:, 1:])
        assert result[1, 0].eq(0).all()

    def test_without_causality(self, dense):
        given = states(2, 4)
        result, past = attend(given, add_casual_mask=False)
        torch.testing.assert_close(result, Copies(dense, causal=False)(given))
        assert tokens_of(past) == 4

    @pytest.mark.parametrize("mask", [None, "float", "bool"])
    @pytest.mark.parametrize("form", ["slopes", "bloom", "bias"])
    def test_alibi(self, copies, form, mask):
        slopes = torch.rand(H)
        bias = slopes[:, None] * torch.arange(5.0)
        alibi = {"slopes": slopes, "bloom": bias.repeat(2, 1)[:, None], "bias": bias[None, :, None]}[form]
        masks = {None: None, "float": torch.randn(2, 1, 5, 5), "bool": torch.ones(2, 1, 1, 5, dtype=torch.bool)}[mask]
        given = states(2, 5)
        result, _ = attend(given, alibi=alibi, attention_mask=masks)
        added = masks if mask == "float" else None
        torch.testing.assert_close(result, copies(given, added, slopes))

    def test_values_of_another_size(self, copies):
        past = None
        for length in (3, 1):
            given = states(2, length, value_dim=10)
            result, past = attend(given, past)
            torch.testing.assert_close(result, copies(given))

    def test_seq_info_takes_the_place_of_the_tuples(self, copies):
        given = states(1, 3)
        _, past = attend(given)
        copies(given)
        shorter = torch.zeros(1, 2, 2, 1, dtype=torch.long)  # forget the last token
        copies.past = tuple(cache[:, :2] for cache in copies.past)
        given = states(1, 1)
        result, past = attend(given, past, seq_info=shorter)
        torch.testing.assert_close(result, copies(given))
        assert tokens_of(past) == 3

    def test_module_class_method_and_function(self):
        given = states(1, 3)
        module = modules.IndirectAccessKVCacheAttention(text_max_length=7)
        one, _, past = module(*given, SCALE)
        other, _, _ = modules.IndirectAccessKVCacheAttention.apply_function(*given, SCALE, text_max_length=7)
        assert one.shape == (1, H, 3, D)
        assert torch.equal(one, other)
        assert past[1].shape[0] == 7


class TestCache:
    def test_doubles_when_full(self, copies):
        past = None
        capacities = []
        for length in (3, 1, 1, 4):
            given = states(2, length)
            result, past = attend(given, past, text_max_length=4)
            torch.testing.assert_close(result, copies(given))
            capacities.append(past[1].shape[0])
        assert capacities == [4, 4, 8, 16]

    def test_doubling_keeps_the_beams(self, copies):
        past = None
        for length in (3, 1, 1, 1, 1):
            given = states(3, length)
            result, past = attend(given, past, text_max_length=3)
            torch.testing.assert_close(result, copies(given))
            reorder_cache((past,), torch.tensor([2, 0, 0]))
            copies.reorder([2, 0, 0])

    def test_is_written_in_place(self):
        _, past = attend(states(2, 3), text_max_length=8)
        _, later = attend(states(2, 1), past)
        assert [tensor.data_ptr() for tensor in past[1:]] == [tensor.data_ptr() for tensor in later[1:]]

    def test_nan_stays_in_its_sequence(self):
        _, past = attend(states(3, 3))
        past[1][1, 0, 0] = torch.nan
        result, _ = attend(states(3, 1), past)
        assert result[0, :, : H // KV].isnan().all()
        assert result[1:].isfinite().all()
        assert result[0, :, H // KV :].isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"head_mask": torch.ones(H)}, "head_mask: expected None"),
            ({"scale_attn": 0.0}, "scale_attn: expected a divisor above 0"),
            ({"attention_mask": torch.zeros(2, 4)}, r"attention_mask: expected four dimensions .* \[2, 4, 1, 4\]"),
            ({"attention_mask": torch.zeros(2, 1, 1, 3)}, "attention_mask: expected four dimensions"),
            ({"attention_mask": torch.zeros(2, 1, 1, 4, dtype=torch.long)}, "attention_mask: expected bool or float"),
            ({"alibi": torch.zeros(3)}, "alibi: expected a slope for each of 4 heads, got 3"),
            ({"alibi": torch.zeros(6, 1, 4)}, "alibi: expected four dimensions"),
            ({"key": torch.zeros(2, 2, KV, D)}, "query, key, value: expected"),
            ({"key": torch.zeros(2, 1, 3, D)}, "query, key, value: expected"),
            ({"query": torch.zeros(2, 1, 3, D)}, "query, key, value: expected"),
            ({"value": torch.zeros(2, 1, KV)}, "query, key, value: expected"),
            ({"value": torch.zeros(2, 1, KV, D + 1)}, "value_cache: expected"),
            ({"value": torch.zeros(2, 1, KV, D).bfloat16()}, "query, key, value: expected one dtype"),
            ({name: torch.zeros(2, 1, KV, D).bfloat16() for name in ("query", "key", "value")}, "key_cache: expected"),
            (
                {name: torch.zeros(3, 1, KV, D) for name in ("query", "key", "value")},
                "query: expected one row for each",
            ),
            ({"seq_info": torch.zeros(3)}, "seq_info: expected four dimensions"),
            ({"seq_info": torch.zeros(1, 9, 9, 1)}, "at most 8 tokens, got torch.int64 .* and 9 tokens"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, message):
        _, past = attend(states(2, 3), text_max_length=8)
        before = [tensor.clone() for tensor in past[1:]]
        arguments = dict(zip(("query", "key", "value"), states(2, 1), strict=True))
        arguments |= {"scale_attn": SCALE, "layer_past": past, **change}
        with pytest.raises((ValueError, TypeError), match=message):
            functional.indirect_access_kv_cache_attention(**arguments)
        for tensor, copy in zip(past[1:], before, strict=True):
            assert tensor.view(torch.uint8).equal(copy.view(torch.uint8))

    @pytest.mark.parametrize("beams", [[0, 2], [-1, 0]])
    def test_refuses_beams_that_are_none(self, beams):
        _, past = attend(states(2, 3))
        reorder_cache((past,), torch.tensor(beams))
        with pytest.raises(ValueError, match=r"beam_idx: expected rows 0..1 for token 2"):
            attend(states(2, 1), past)

    def test_refuses_tuples_of_another_kind(self):
        _, past = attend(states(2, 3))
        with pytest.raises(ValueError, match=r"layer_past: expected .*, got 2"):
            attend(states(2, 1), past[:2])
        with pytest.raises(ValueError, match=r"layer_past: expected beam_idx int64"):
            attend(states(2, 1), (*past[:3], past[3].int()))
