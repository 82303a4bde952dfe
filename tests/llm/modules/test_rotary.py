import copy

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from ipex_quant.llm import functional, modules

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 3e-2}}
B, L, H, D = 2, 5, 3, 16

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
LONGROPE = {"short_factor": [1.0 + i / 8 for i in range(D // 2)], "long_factor": [2.0 + i for i in range(D // 2)]}


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


def angles(positions, dim=D, base=10000.0):
    return positions[..., None].float() / base ** (torch.arange(0, dim, 2) / dim)


def turned(x, angle, interleaved):
    """`x` ``[B, L, H, D]`` as complex numbers, times those of the angles ``[.., L, D / 2]``."""
    x = x.double()
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    unit = torch.polar(torch.ones_like(angle).double(), angle.double())[:, :, None]
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * unit)
    return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)


class TestModule:
    @pytest.mark.parametrize("offset", [1, 4])
    def test_turns_the_first_features(self, dtype, offset):
        x, positions = torch.randn(B, L, H, D).to(dtype), torch.randint(0, 50, (B, L))
        result = modules.RotaryEmbedding(64, 8)(x, positions, H, D, offset, 8)
        assert result.dtype == dtype
        expected = torch.cat((turned(x[..., :8], angles(positions, 8), offset == 1), x[..., 8:]), -1).to(dtype)
        torch.testing.assert_close(result, expected, **TOLERANCE[dtype])

    def test_is_transformers_gptj(self):
        x, positions = torch.randn(B, L, H, D), torch.randint(0, 50, (B, L))
        angle = angles(positions, 8)
        expected = x.clone()
        expected[..., :8] = gptj_rotary(x[..., :8], angle.sin(), angle.cos())
        rope = modules.RotaryEmbedding(64, 8, backbone="GPTJForCausalLM")
        torch.testing.assert_close(rope(x, positions, H, D, 1, 8), expected)

    @pytest.mark.parametrize("name", SCALINGS)
    @pytest.mark.parametrize("last", [20, 200])
    def test_scales_as_transformers(self, name, last):
        x, positions = torch.randn(1, 2, H, D), torch.tensor([[3, last - 1]])
        parameters = {"rope_type": name, "rope_theta": 500.0, **SCALINGS[name]}
        config = LlamaConfig(
            hidden_size=D, num_attention_heads=1, max_position_embeddings=64, rope_parameters=parameters
        )
        cos, sin = LlamaRotaryEmbedding(config)(x, positions)
        expected, _ = llama_rotary(x, x, cos, sin, unsqueeze_dim=2)
        given = {"rope_type": name, **SCALINGS[name]} if SCALINGS[name] else None
        rope = modules.RotaryEmbedding(64, D, 500.0, "LlamaForCausalLM", given)
        torch.testing.assert_close(rope(x, positions, H, D, D // 2, D), expected)

    @pytest.mark.parametrize("name", ["longrope", "su"])
    @pytest.mark.parametrize("last", [20, 100])
    def test_longrope_has_two_sets_of_frequencies(self, name, last):
        x, positions = torch.randn(1, 2, H, D), torch.tensor([[3, last - 1]])
        config = Phi3Config(
            hidden_size=D,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **LONGROPE},
            pad_token_id=0,
        )
        cos, sin = Phi3RotaryEmbedding(config)(x, positions)
        expected, _ = llama_rotary(x, x, cos, sin, unsqueeze_dim=2)
        given = {"type": name, **LONGROPE, "original_max_position_embeddings": 32}
        rope = modules.RotaryEmbedding(128, D, extra_rope_config=given)
        torch.testing.assert_close(rope(x, positions, H, D, D // 2, D), expected)

    def test_seq_len_chooses_the_set(self):
        x, positions = torch.randn(1, 2, H, D), torch.tensor([[3, 4]])
        given = {"type": "longrope", **LONGROPE, "original_max_position_embeddings": 32}
        rope = modules.RotaryEmbedding(128, D, extra_rope_config=given)
        short, long = (rope(x, positions, H, D, D // 2, D, seq_len) for seq_len in (None, 33))
        assert not torch.allclose(short, long)

    def test_rope_ratio_multiplies_the_base(self):
        x, positions = torch.randn(1, 2, H, D), torch.tensor([[3, 4]])
        result = modules.RotaryEmbedding(64, D, 100.0, extra_rope_config={"rope_ratio": 5})(x, positions, H, D, 1, D)
        torch.testing.assert_close(result, turned(x, angles(positions, base=500.0), True).float())

    def test_one_position_is_that_of_the_first_token(self):
        x, rope = torch.randn(B, L, H, D), modules.RotaryEmbedding(64, D)
        expected = rope(x, torch.arange(7, 7 + L)[None], H, D, 8, D)
        assert torch.equal(rope(x, torch.tensor(7), H, D, 8, D), expected)
        assert torch.equal(rope(x, torch.tensor([[7]]), H, D, 8, D), expected)

    def test_heads_may_be_in_one_dimension(self):
        x, rope, positions = torch.randn(B, L, H, D), modules.RotaryEmbedding(64, D), torch.arange(L)[None]
        expected = rope(x, positions, H, D, 1, D)
        assert torch.equal(rope(x.flatten(2), positions, H, D, 1, D), expected.flatten(2))

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_splits_a_fused_projection(self, dtype, kv_heads):
        heads = [torch.randn(B, L, n, D).to(dtype) for n in (4, kv_heads, kv_heads)]
        rope, positions = modules.RotaryEmbedding(64, 8), torch.arange(L)[None]
        query, key, value = rope(torch.cat(heads, 2).flatten(2), positions, 4, D, 4, 8, num_concats=3)
        assert torch.equal(query, rope(heads[0], positions, 4, D, 4, 8))
        assert torch.equal(key, rope(heads[1], positions, kv_heads, D, 4, 8))
        assert torch.equal(value, heads[2])

    def test_input_stays_as_it_was(self):
        x = torch.randn(B, L, H, D)
        before = x.clone()
        modules.RotaryEmbedding(64, D)(x, torch.arange(L)[None], H, D, 1, D)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("offset", [1, 4])
    def test_gradient_turns_back(self, offset):
        x, direction = torch.randn(B, L, H, D), torch.randn(B, L, H, D)
        rope, positions = modules.RotaryEmbedding(64, 8), torch.randint(0, 50, (B, L))
        with torch.enable_grad():
            leaf = x.requires_grad_()
            (rope(leaf, positions, H, D, offset, 8) * direction).sum().backward()
        torch.testing.assert_close(leaf.grad, rope(direction, -positions, H, D, offset, 8))

    def test_frequencies_keep_their_precision(self):
        x, positions = torch.randn(1, 1, H, D).bfloat16(), torch.tensor([[5001]])
        rope = modules.RotaryEmbedding(8192, D)
        expected = rope(x, positions, H, D, 8, D)
        assert torch.equal(copy.deepcopy(rope).to(torch.bfloat16)(x, positions, H, D, 8, D), expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rotary_ndims": 8}, "rotary_ndims: expected pos_embd_dim, 16, got 8"),
            ({"offset": 2}, "offset: expected 1 or half of rotary_ndims, 8, got 2"),
            ({"num_head": 4}, r"x: expected \[B, L, num_head, head_dim\]"),
            ({"head_dim": 8}, r"x: expected \[B, L, num_head, head_dim\]"),
            ({"position_ids": torch.zeros(B, L + 1, dtype=torch.long)}, r"position_ids: expected \[2 or 1, 5\]"),
            ({"position_ids": torch.zeros(3, L, dtype=torch.long)}, r"position_ids: expected \[2 or 1, 5\]"),
            ({"position_ids": torch.zeros(B, L)}, "position_ids: expected integers, got torch.float32"),
            ({"num_concats": 3}, r"x: expected \[B, L, num_head \+ 2 \* kv_heads, head_dim\]"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, message):
        arguments = {
            "position_ids": torch.arange(L)[None],
            "num_head": H,
            "head_dim": D,
            "offset": 1,
            "rotary_ndims": D,
        }
        with pytest.raises(ValueError, match=message):
            modules.RotaryEmbedding(64, D)(torch.randn(B, L, H, D), **{**arguments, **change})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"rope_type": "spiral"}, "expected a rope_type of"),
            ({"rope_type": "llama3", "factor": 8.0}, "not what rope_type 'llama3' needs: .*low_freq_factor"),
            ({"rope_type": "linear"}, "not what rope_type 'linear' needs"),
            (
                {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8},
                "expected 8 of short_factor, got 1",
            ),
            (
                {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
                "expected 8 of long_factor, got 7",
            ),
            ({"factr": 2.0}, r"expected keys of .*, got \['factr'\]"),
        ],
    )
    def test_refuses_configurations_that_are_none(self, config, message):
        with pytest.raises(ValueError, match=message):
            modules.RotaryEmbedding(64, D, extra_rope_config=config)

    def test_refuses_odd_dimensions(self):
        with pytest.raises(ValueError, match="pos_embd_dim: expected an even number above 0, got 7"):
            modules.RotaryEmbedding(64, 7)


class TestFunction:
    @pytest.mark.parametrize("half", [True, False])
    @pytest.mark.parametrize("per_feature", [True, False])
    @pytest.mark.parametrize("layout", ["batches", "tokens", "positions", "table"])
    def test_turns_in_place(self, dtype, half, per_feature, layout):
        positions = torch.arange(L).expand(B, L) if layout == "positions" else torch.randint(0, 50, (B, L))
        angle = angles(positions, 8)
        table = {"positions": angle[0], "table": angles(torch.arange(50), 8)}.get(layout, angle.flatten(0, 1))
        if per_feature:
            table = torch.cat((table, table), -1) if half else table.repeat_interleave(2, -1)
        query, key = torch.randn(B, L, H, D).to(dtype), torch.randn(B, L, 1, D).to(dtype)
        expected = [torch.cat((turned(x[..., :8], angle, not half), x[..., 8:]), -1).to(dtype) for x in (query, key)]
        if layout == "tokens":
            query, key, expected = query.flatten(0, 1), key.flatten(0, 1), [x.flatten(0, 1) for x in expected]
        ids = positions if layout == "table" else None
        results = functional.rotary_embedding(query, key, table.sin(), table.cos(), 8, half, ids)
        assert results[0] is query
        assert results[1] is key
        torch.testing.assert_close(list(results), expected, **TOLERANCE[dtype])

    def test_class_method_is_the_function(self):
        query, key, angle = torch.randn(L, H, D), torch.randn(L, 1, D), angles(torch.arange(L))
        expected = functional.rotary_embedding(query.clone(), key.clone(), angle.sin(), angle.cos(), D, True)
        result = modules.RotaryEmbedding.apply_function(query, key, angle.sin(), angle.cos(), D, True)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)

    def test_writes_through_views(self):
        fused, angle = torch.randn(L, (H + 1) * D), angles(torch.arange(L))
        before = fused.clone()
        query, key = fused.split((H * D, D), -1)
        functional.rotary_embedding(
            query.unflatten(-1, (H, D)), key.unflatten(-1, (1, D)), angle.sin(), angle.cos(), D, True
        )
        torch.testing.assert_close(fused, turned(before.view(1, L, H + 1, D), angle[None], False).float().view(L, -1))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rotary_dim": 18}, "rotary_dim: expected an even number up to 16, got 18"),
            ({"rotary_dim": 7}, "rotary_dim: expected an even number up to 16, got 7"),
            ({"cos": torch.ones(L, 5)}, "cos: expected rotary_dim or half of it, 16, in the last dimension, got 5"),
            ({"sin": torch.ones(L + 1, 8)}, "sin: expected a row for each of 5 tokens or 5 positions, got 6"),
            ({"key": torch.randn(L + 1, 1, D)}, "query, key: expected"),
            ({"key": torch.randn(1, L, 1, D)}, "query, key: expected"),
            ({"position_ids": torch.arange(L) + 1}, r"position_ids: expected 0..4, the rows of cos"),
            ({"position_ids": torch.arange(L) - 1}, r"position_ids: expected 0..4, the rows of cos"),
            ({"position_ids": torch.arange(L + 1)}, r"position_ids: expected integers \[1 or 1, 5\]"),
            ({"key": torch.randn(L, 1, D, dtype=torch.float64)}, "got Double"),
        ],
    )
    def test_refuses_what_does_not_fit_and_writes_nothing(self, change, message):
        angle = angles(torch.arange(L))
        arguments = {
            "query": torch.randn(L, H, D),
            "key": torch.randn(L, 1, D),
            "sin": angle.sin(),
            "cos": angle.cos(),
            "rotary_dim": D,
            "rotary_half": True,
        } | change
        before = arguments["query"].clone()
        with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
            functional.rotary_embedding(**arguments)
        assert torch.equal(arguments["query"], before)


@pytest.mark.parametrize("half", [True, False])
def test_tables_may_have_every_value_twice_in_either_order(half):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, L, 4, 12, generator=generator), torch.randn(2, L, 2, 12, generator=generator)
    angle = torch.randn(L, 4, generator=generator)

    def rotated(table, **options):
        return functional.rotary_embedding(query.clone(), key.clone(), table.sin(), table.cos(), 8, half, **options)

    expected = rotated(angle)
    for table in (torch.cat((angle, angle), -1), angle.repeat_interleave(2, -1)):
        assert all(torch.equal(a, b) for a, b in zip(rotated(table), expected, strict=True))
        at = torch.arange(L)[None]
        assert all(torch.equal(a, b) for a, b in zip(rotated(table, position_ids=at), expected, strict=True))
    with pytest.raises(ValueError, match="cos: expected every value twice"):
        rotated(torch.randn(L, 8, generator=generator))
