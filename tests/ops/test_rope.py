"""Rotary embedding in this process against its plain-torch definition; test_isa.py runs this at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from ipex_quant import ops
from ipex_quant.ops import reference_llm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 4),
    heads=st.integers(1, 3),
    half=st.integers(0, 40),
    rest=st.sampled_from([0, 1, 5, 32]),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries({key: st.booleans() for key in ("interleaved", "shared", "full", "single")}),
    layout=st.sampled_from(["plain", "heads first", "strided"]),
)
def test_bit_equal_to_the_definition(batch, length, heads, half, rest, dtype, options, layout) -> None:
    dim = max(2 * half + rest, 1)
    if layout == "plain":
        x = draw(batch, length, heads, dim, dtype=dtype)
    elif layout == "heads first":
        x = draw(batch, heads, length, dim, dtype=dtype).transpose(1, 2)
    else:
        x = draw(batch, length, heads, 2 * dim, dtype=dtype)[..., ::2]
    shape = (1 if options["shared"] else batch, length, 2 * half if options["full"] else half)
    tables = [draw(*shape, dtype=torch.float32 if options["single"] else dtype, seed=seed) for seed in (1, 2)]
    got = ops.rotary(x, *tables, 2 * half, options["interleaved"])
    assert got.is_contiguous()
    assert torch.equal(got, reference.rotary(x, *tables, 2 * half, options["interleaved"]))


def test_agrees_with_transformers() -> None:
    query, angles = draw(2, 5, 3, 64), draw(2, 5, 32, seed=1) * 10
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    expected, _ = modeling_llama.apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=2)
    assert torch.equal(ops.rotary(query, cos, sin), expected)
    assert torch.equal(ops.rotary(query, angles.cos(), angles.sin()), expected)
    expected = modeling_gptj.apply_rotary_pos_emb(query, angles.sin(), angles.cos())
    assert torch.equal(ops.rotary(query, angles.cos(), angles.sin(), interleaved=True), expected)
    low = ops.rotary(query.bfloat16(), cos.bfloat16(), sin.bfloat16())
    torch.testing.assert_close(low.float(), ops.rotary(query, cos, sin), rtol=2e-2, atol=5e-2)


def test_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert ops.rotary(x, cos, sin, 4).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0, 5.0]
    assert ops.rotary(x, cos, sin, 4, interleaved=True).flatten().tolist() == [-2.0, 1.0, 3.0, 4.0, 5.0]


def test_rotation_keeps_lengths_and_threads_do_not_matter() -> None:
    x, angles = draw(2, 300, 4, 64), draw(1, 300, 32, seed=1) * 10
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ops.rotary(x, angles.cos(), angles.sin()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].norm(dim=-1), x.norm(dim=-1))


def test_unaligned_and_expanded_tensors() -> None:
    x = draw(1 + 6 * 10, dtype=torch.bfloat16)[1:].view(1, 2, 3, 10)
    cos, sin = draw(2, 5, seed=1)[None].expand(2, 2, 5), draw(2, 5, seed=2)[None].expand(2, 2, 5)
    both = x.expand(2, 2, 3, 10)
    assert torch.equal(ops.rotary(both, cos, sin), reference.rotary(both, cos, sin))


GOOD = {"x": draw(2, 3, 4, 10), "cos": draw(2, 3, 4), "sin": draw(2, 3, 4), "rotary_dim": 8}
BAD = [
    ({"x": draw(2, 3, 10)}, "x"),
    ({"x": draw(2, 3, 4, 10).double()}, "x"),
    ({"x": draw(3, 3, 4, 10)}, "cos"),
    ({"x": draw(2, 2, 4, 10)}, "cos"),
    ({"x": draw(2, 3, 4, 6)}, "rotary_dim"),
    ({"x": draw(2, 3, 4, 10).to("meta")}, "meta|CPU|device"),
    ({"rotary_dim": 7}, "rotary_dim"),
    ({"rotary_dim": -2}, "rotary_dim"),
    ({"rotary_dim": 2**62}, "rotary_dim"),
    ({"rotary_dim": 10}, "cos"),
    ({"rotary_dim": None}, "cos"),
    ({"cos": draw(2, 3, 4, 1)}, "cos"),
    ({"cos": draw(2, 3, 8)}, "sin"),
    ({"cos": draw(2, 3, 4).half()}, "cos"),
    ({"sin": draw(2, 3, 8)}, "sin"),
    ({"sin": draw(1, 3, 4)}, "sin"),
    ({"sin": draw(2, 3, 5)}, "sin"),
    ({"sin": draw(2, 3, 4).double()}, "sin"),
    ({"x": GOOD["x"].half(), "sin": GOOD["sin"].half()}, "sin"),
    ({"sin": draw(2, 3, 4).to("meta")}, "meta|CPU|device"),
]


@pytest.mark.parametrize(("change", "name"), BAD)
def test_bad_argument(change: dict, name: str) -> None:
    ops.rotary(**GOOD)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=name):
        ops.rotary(**(GOOD | change))


def test_opcheck() -> None:
    for interleaved in (False, True):
        arguments = (GOOD["x"], GOOD["cos"], GOOD["sin"], 8, interleaved)
        torch.library.opcheck(torch.ops.ipex_quant.rotary.default, arguments)


def test_compile_without_graph_break() -> None:
    def run(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        return ops.rotary(x.transpose(1, 2) * 2, cos, cos + 1, interleaved=True) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for length in (2, 4, 9):
        arguments = draw(2, 3, length, 8), draw(1, length, 4)
        assert torch.equal(compiled(*arguments), run(*arguments))
