import pytest
import torch

from ipex_quant import ops
from ipex_quant.llm.modules import PagedAttention

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
BLOCKS, BLOCK, H, KV, D = 12, 8, 4, 2, 24
LENGTHS = [5, 8, 19, 1]
SCALE = 0.3


def caches(dtype=torch.float32, layout=(KV, BLOCK)):
    return [torch.full((BLOCKS, *layout, D), 7.0).to(dtype) for _ in range(2)]


def head_mapping():
    return torch.arange(H) * KV // H


def tables():
    """Blocks of each sequence, in no order; entries that no token needs are no blocks."""
    order = iter(torch.randperm(BLOCKS).tolist())
    counts = [-(-length // BLOCK) for length in LENGTHS]
    return torch.tensor([[next(order) if i < count else -5 for i in range(max(counts))] for count in counts]).int()


def slots_of(block_tables, lengths=LENGTHS):
    return torch.cat(
        [table.long()[torch.arange(n) // BLOCK] * BLOCK + torch.arange(n) % BLOCK
         for table, n in zip(block_tables, lengths, strict=True)]
    )  # fmt: skip


class Setup:
    """A cache that holds the keys and values of all sequences."""

    def __init__(self, dtype=torch.float32, cache_dtype=None, layout=(KV, BLOCK), **scales):
        self.tables = tables()
        tokens = sum(LENGTHS)
        self.key, self.value = (torch.randn(tokens, KV, D).to(dtype) for _ in range(2))
        self.caches = caches(cache_dtype or dtype, layout)
        PagedAttention.reshape_and_cache(self.key, self.value, *self.caches, slots_of(self.tables), **scales)
        self.query = torch.randn(len(LENGTHS), H, D).to(dtype)
        self.lengths = torch.tensor(LENGTHS).int()

    def single(self, **change):
        out = torch.full_like(self.query, 9.0)
        arguments = {
            "out": out,
            "query": self.query,
            "key_cache": self.caches[0],
            "value_cache": self.caches[1],
            "head_mapping": head_mapping(),
            "scale": SCALE,
            "block_tables": self.tables,
            "context_lens": self.lengths,
            "block_size": BLOCK,
            "max_context_len": max(LENGTHS),
            **change,
        }
        assert PagedAttention.single_query_cached_kv_attention(**arguments) is arguments["out"]
        return arguments["out"]

    def several(self, query, counts, causal=True, **change):
        out = torch.full_like(query, 9.0)
        ends = [torch.tensor([0, *numbers]).cumsum(0).int() for numbers in (counts, LENGTHS)]
        arguments = {
            "output": out,
            "query": query,
            "key_cache": self.caches[0],
            "value_cache": self.caches[1],
            "cu_seqlens_q": ends[0],
            "cu_seqlens_kv": ends[1],
            "max_seqlen_q": max(counts),
            "max_seqlen_kv": max(LENGTHS),
            "scale": SCALE,
            "is_cusal": causal,
            "block_tables": self.tables,
            "alibi_slopes": None,
            **change,
        }
        assert PagedAttention.flash_attn_varlen_func(**arguments) is arguments["output"]
        return arguments["output"]

    def expected(self, dense, query, counts, **options):
        parts = zip(query.split(counts), self.key.split(LENGTHS), self.value.split(LENGTHS), strict=True)
        return torch.cat([dense(*part, SCALE, **options) for part in parts]).to(query.dtype)


class TestWriting:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("write", [PagedAttention.reshape_and_cache, PagedAttention.reshape_and_cache_flash])
    def test_puts_tokens_into_their_slots(self, write, dtype):
        key, value = torch.randn(3, KV, D).to(dtype), torch.randn(3, KV, D).to(dtype)
        key_cache, value_cache = caches(dtype)
        write(key, value, key_cache, value_cache, torch.tensor([17, -1, 3], dtype=torch.int32))
        for states, cache in ((key, key_cache), (value, value_cache)):
            assert torch.equal(cache[2, :, 1], states[0])
            assert torch.equal(cache[0, :, 3], states[2])
            assert cache.eq(7).sum() == cache.numel() - 2 * KV * D

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"slot_mapping": torch.tensor([0, BLOCKS * BLOCK])}, IndexError, r"slot_mapping: expected -1\.\.95"),
            ({"slot_mapping": torch.tensor([-2, 0])}, IndexError, r"slot_mapping: expected -1\.\.95, got -2\.\.0"),
            ({"slot_mapping": torch.tensor([0])}, ValueError, r"slot_mapping: expected integers \[2\]"),
            ({"slot_mapping": torch.tensor([0.0, 1.0])}, ValueError, r"slot_mapping: expected integers \[2\]"),
            ({"value": torch.ones(2, KV, D + 1)}, ValueError, "key_cache, value_cache: expected"),
            ({"key": torch.ones(2, KV + 1, D)}, ValueError, "key, value: expected"),
            ({"key": torch.ones(2, KV, D).bfloat16()}, TypeError, "expected torch.bfloat16 or float8_e5m2"),
            (
                {"value_cache": torch.full((BLOCKS, KV, BLOCK, D - 1), 7.0)},
                ValueError,
                "key_cache, value_cache: expected",
            ),
            ({"value_cache": torch.full((KV, BLOCK, D), 7.0)}, ValueError, "key_cache, value_cache: expected"),
            ({"kv_cache_dtype": "int3"}, TypeError, "unsupported kv_cache_dtype"),
            ({"kv_cache_dtype": "fp8"}, TypeError, "only float8_e5m2 supported"),
            ({"k_scale": 2.0}, ValueError, "k_scale, v_scale: expected 1.0"),
            (
                {"value_cache": torch.full((BLOCKS, KV, D, BLOCK), 7.0).transpose(2, 3)},
                RuntimeError,
                "value_cache: expected",
            ),
            ({"key": torch.ones(2, KV * D), "value": torch.ones(2, KV * D)}, ValueError, "key, value: expected"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, error, message):
        key_cache, value_cache = caches()
        arguments = {
            "key": torch.ones(2, KV, D),
            "value": torch.ones(2, KV, D),
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": torch.tensor([0, 1]),
            **change,
        }
        with pytest.raises(error, match=message):
            PagedAttention.reshape_and_cache(**arguments)
        assert key_cache.eq(7).all()
        assert arguments["value_cache"].eq(7).all()

    def test_takes_tokens_with_any_strides(self):
        key, value = (torch.randn(D, 3, KV).permute(1, 2, 0) for _ in range(2))
        written, expected = caches(), caches()
        slots = torch.tensor([17, 4, 3])
        PagedAttention.reshape_and_cache(key, value, *written, slots)
        PagedAttention.reshape_and_cache(key.contiguous(), value.contiguous(), *expected, slots)
        for one, other in zip(written, expected, strict=True):
            assert torch.equal(one, other)


class TestSingleQuery:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ({}, {}),
            ({"window_size": 3}, {"left": 2}),
            ({"softcap": 1.5}, {"softcap": 1.5}),
            ({"window_size": 3, "softcap": 1.5}, {"left": 2, "softcap": 1.5}),
            ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}, {"alibi": [0.5, 0.25, 0.125, 0.0625]}),
        ],
    )
    def test_attends_to_the_blocks_of_each_sequence(self, dense, dtype, given, meant):
        setup = Setup(dtype)
        expected = setup.expected(dense, setup.query, [1] * len(LENGTHS), **meant)
        torch.testing.assert_close(setup.single(**given), expected, **TOLERANCE[dtype])

    def test_reads_all_sequences_in_one_call(self, monkeypatch):
        setup, calls = Setup(), []
        op = ops.paged_attention
        monkeypatch.setattr(ops, "paged_attention", lambda *args, **options: calls.append(args) or op(*args, **options))
        monkeypatch.setattr(ops, "attention", None)
        setup.single(window_size=3, softcap=1.5)
        setup.several(torch.randn(len(LENGTHS), H, D), [1] * len(LENGTHS))
        assert len(calls) == 2

    def test_layout_of_the_document(self):
        one, other = Setup(), None
        torch.manual_seed(0)
        swapped = [cache.transpose(1, 2).contiguous() for cache in one.caches]
        other = caches(layout=(BLOCK, KV))
        PagedAttention.reshape_and_cache(one.key, one.value, *other, slots_of(one.tables))
        for cache, written in zip(swapped, other, strict=True):
            assert torch.equal(cache, written)
        assert torch.equal(one.single(key_cache=other[0], value_cache=other[1]), one.single())

    def test_sequence_of_no_tokens_gets_zero(self):
        setup = Setup()
        full = setup.single()
        setup.lengths[1] = 0
        result = setup.single()
        assert result[1].eq(0).all()
        assert torch.equal(result[[0, 2, 3]], full[[0, 2, 3]])

    def test_nan_stays_in_its_sequence(self):
        setup = Setup()
        setup.caches[0][setup.tables[2, 1]] = torch.nan
        result = setup.single()
        assert result[2].isnan().any()
        assert result[[0, 1, 3]].isfinite().all()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"block_size": 16}, ValueError, "block_size: expected 8, that of the cache, got 16"),
            ({"head_mapping": torch.zeros(H, dtype=torch.long)}, ValueError, "head_mapping: expected 2 heads for each"),
            ({"head_mapping": torch.zeros(3, dtype=torch.long)}, ValueError, "head_mapping: expected a KV head"),
            ({"query": torch.ones(4, 3, D)}, ValueError, "head_mapping: expected a KV head for each of 3 heads"),
            ({"query": torch.ones(4, H, D + 1)}, ValueError, "out: expected|key_cache, value_cache: expected"),
            ({"query": torch.ones(4, H * D)}, ValueError, r"query: expected \[sequences, H, D\]"),
            ({"query": torch.ones(4, H, D).bfloat16()}, ValueError, "out: expected"),
            ({"query": torch.ones(3, H, D), "out": torch.full((3, H, D), 9.0)}, ValueError, "context_lens: expected 3"),
            ({"context_lens": torch.tensor([5, 8, 25, 1])}, IndexError, r"context_lens: expected 0\.\.19, got 1\.\.25"),
            (
                {"context_lens": torch.tensor([5, 8, 25, 1]), "max_context_len": 99},
                ValueError,
                "block_tables: expected 4 blocks of 8 for 25 tokens, got 3",
            ),
            ({"context_lens": torch.tensor([5, -1, 19, 1])}, IndexError, "context_lens: expected"),
            ({"context_lens": torch.tensor([9, 8, 19, 1])}, IndexError, r"block_tables: expected 0\.\.11, got -5"),
            ({"context_lens": torch.tensor([5, 8, 19])}, ValueError, "block_tables: expected a row for each of 3"),
            ({"context_lens": torch.ones(4)}, ValueError, "context_lens: expected 1-D integers"),
            (
                {"block_tables": torch.full((4, 3), 2**32)},
                IndexError,
                r"block_tables: expected 0\.\.11, got 4294967296",
            ),
            ({"block_tables": torch.full((4, 3), BLOCKS)}, IndexError, r"block_tables: expected 0\.\.11, got 12"),
            ({"block_tables": torch.zeros(12, dtype=torch.long)}, ValueError, "block_tables: expected 2-D integers"),
            ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \[4\]"),
            ({"v_scale": 0.5}, ValueError, "k_scale, v_scale: expected 1.0"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, error, message):
        out = change.get("out", torch.full((4, H, D), 9.0))
        with pytest.raises(error, match=message):
            Setup().single(**{"out": out, **change})
        assert out.eq(9).all()


class TestSeveralQueries:
    COUNTS = (2, 0, 7, 1)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ({}, {}),
            ({"causal": False}, {"causal": False}),
            ({"window_size_left": 3}, {"left": 3}),
            (
                {"causal": False, "window_size_left": 3, "window_size_right": 2},
                {"causal": False, "left": 3, "right": 2},
            ),
            ({"softcap": 1.5, "window_size_left": 4}, {"softcap": 1.5, "left": 4}),
            ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}, {"alibi": [0.5, 0.25, 0.125, 0.0625]}),
        ],
    )
    def test_are_the_last_tokens_of_their_sequence(self, dense, dtype, given, meant):
        setup = Setup(dtype)
        query = torch.randn(sum(self.COUNTS), H, D).to(dtype)
        expected = setup.expected(dense, query, list(self.COUNTS), **meant)
        torch.testing.assert_close(setup.several(query, self.COUNTS, **given), expected, **TOLERANCE[dtype])

    def test_nan_stays_in_its_sequence(self):
        setup = Setup()
        setup.caches[0][setup.tables[2, 1]] = torch.nan
        result = setup.several(torch.randn(sum(self.COUNTS), H, D), self.COUNTS)
        assert result[2:9].isnan().any()
        assert result[[0, 1, 9]].isfinite().all()

    def test_wrong_heads(self):
        out = torch.full((10, 3, D), 9.0)
        with pytest.raises(ValueError, match="query: expected heads that the 2 KV heads of the cache divide, got 3"):
            Setup().several(torch.ones(10, 3, D), self.COUNTS, output=out)
        assert out.eq(9).all()

    def test_has_the_name_of_the_docstring(self):
        assert PagedAttention.flash_atten_varlen == PagedAttention.flash_attn_varlen_func

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"cu_seqlens_q": torch.tensor([0, 2, 2, 9])}, ValueError, "cu_seqlens_q: expected starts"),
            ({"cu_seqlens_kv": torch.tensor([0, 5, 13, 32])}, ValueError, "expected one length, got 5, 4"),
            ({"cu_seqlens_kv": torch.tensor([0, 5, 3, 32, 33])}, ValueError, "cu_seqlens_kv: expected starts"),
            (
                {"max_seqlen_kv": 18},
                ValueError,
                "cu_seqlens_kv: expected sequences of at most 18 tokens, got one of 19",
            ),
            ({"kv_cache_dtype": "fp8"}, TypeError, "only float8_e5m2 supported"),
            ({"kv_cache_dtype": "fp4"}, TypeError, "unsupported kv_cache_dtype"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, error, message):
        out = torch.full((10, H, D), 9.0)
        with pytest.raises(error, match=message):
            Setup().several(torch.ones(10, H, D), self.COUNTS, output=out, **change)
        assert out.eq(9).all()


class TestFp8:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("name", ["auto", "fp8", "fp8_e5m2"])
    @pytest.mark.parametrize("given", [{}, {"window_size": 3}, {"softcap": 1.5}])
    def test_is_read_as_it_was_written(self, dense, dtype, name, given):
        scales = {"k_scale": 0.5, "v_scale": 2.0}
        setup = Setup(dtype, torch.float8_e5m2, kv_cache_dtype=name, **scales)
        for part, scale in (("key", 0.5), ("value", 2.0)):
            setattr(setup, part, (getattr(setup, part).float() / scale).to(torch.float8_e5m2).float() * scale)
        meant = {"left": 2} if "window_size" in given else given
        expected = setup.expected(dense, setup.query, [1] * len(LENGTHS), **meant)
        torch.testing.assert_close(setup.single(**scales, **given), expected, **TOLERANCE[dtype])

    def test_is_read_natively(self, monkeypatch):
        setup = Setup(cache_dtype=torch.float8_e5m2)
        monkeypatch.setattr(ops, "varlen_attention", None)
        setup.single(k_scale=2.0)
        setup.several(torch.randn(len(LENGTHS), H, D), [1] * len(LENGTHS), kv_cache_dtype="fp8")

    def test_has_windows_and_several_queries(self, dense):
        setup = Setup(cache_dtype=torch.float8_e5m2)
        setup.key, setup.value = (states.to(torch.float8_e5m2).float() for states in (setup.key, setup.value))
        counts = TestSeveralQueries.COUNTS
        query = torch.randn(sum(counts), H, D)
        result = setup.several(query, counts, False, window_size_left=3, window_size_right=2)
        expected = setup.expected(dense, query, list(counts), causal=False, left=3, right=2)
        torch.testing.assert_close(result, expected)

    def test_holds_scaled_values(self, dense):
        scales = {"k_scale": 0.5, "v_scale": 2.0}
        setup = Setup(cache_dtype=torch.float8_e5m2, kv_cache_dtype="fp8_e5m2", **scales)
        slot = slots_of(setup.tables)[7]
        stored = setup.caches[1][slot // BLOCK, :, slot % BLOCK]
        assert torch.equal(stored.float(), (setup.value[7] / 2.0).to(torch.float8_e5m2).float())
        for name, scale in (("key", 0.5), ("value", 2.0)):
            states = getattr(setup, name)
            setattr(setup, name, (states / scale).to(torch.float8_e5m2).float() * scale)
        expected = setup.expected(dense, setup.query, [1] * len(LENGTHS))
        torch.testing.assert_close(setup.single(**scales), expected)
