"""`woq_embedding`: rows of a packed weight, bit for bit those of its definition, at the level of this process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.ops import reference

from .weights import KINDS, shuffle_features

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table(n: int, k: int, scheme: WeightScheme, half_scales: bool = False) -> QuantizedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 3
    weight[0] = 0
    if not half_scales:
        return affine.quantize(weight, scheme)
    found = affine.quantize(weight, scheme)
    scales = found.scales.half().float().clamp(min=2.0**-24)  # of 0 there would be no inverse
    return affine.quantize(weight, scheme, scales, found.zero_points)


def look_up(qw: QuantizedWeight, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    packed = ops.pack_weight(qw)
    return ops.woq_embedding(packed.data, ids, qw.shape[1], packed.perm, dtype)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    group_size=st.sampled_from([-1, 1, 4, 32, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    act_order=st.booleans(),
    half_scales=st.booleans(),
    narrow_ids=st.booleans(),
)
def test_rows_are_bit_equal_to_the_definition(
    n, k, kind, group_size, dtype, act_order, half_scales, narrow_ids
) -> None:
    qw = table(n, k, WeightScheme(*kind, group_size), half_scales)
    qw = shuffle_features(qw) if act_order else qw
    ids = torch.randint(n, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = reference.woq_embedding(ids, qw, dtype)
    rows = look_up(qw, ids.int() if narrow_ids else ids, dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows, expected)
    assert torch.equal(rows, affine.dequantize(qw, dtype)[ids])


def test_half_scales_were_among_them() -> None:
    scheme = WeightScheme(WoqWeightDtype.INT8, True, 32)
    sizes = [ops.pack_weight(table(70, 64, scheme, half)).data.numel() for half in (False, True)]
    assert sizes[0] - sizes[1] == 2 * 64 * 2 * 2  # two tiles, 64 columns, two groups, two bytes


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
def test_ids_of_any_shape(shape: tuple[int, ...]) -> None:
    qw = table(9, 20, WeightScheme(WoqWeightDtype.INT4, False, 8))
    rows = look_up(qw, torch.full(shape, 8))
    assert rows.shape == (*shape, 20)
    assert torch.equal(rows, affine.dequantize(qw)[8].expand(rows.shape))


def test_ids_may_be_a_view() -> None:
    qw = table(9, 20, WeightScheme(WoqWeightDtype.INT8, True))
    ids = torch.arange(36).reshape(4, 9)[:, ::2].t() % 9
    assert torch.equal(look_up(qw, ids), look_up(qw, ids.contiguous()))


def test_many_rows_in_several_threads() -> None:
    qw = table(1000, 100, WeightScheme(WoqWeightDtype.INT4, True, 32))
    ids = torch.randint(1000, (2000,), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(look_up(qw, ids), affine.dequantize(qw)[ids])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ids", [[10], [0, -1], [[0, 2**40]], [-(2**63)], [2**63 - 1]])
def test_an_id_out_of_range_is_refused_with_the_range(ids: list) -> None:
    with pytest.raises(RuntimeError, match=r"ids: expected values in 0\.\.9, got"):
        look_up(table(10, 16, WeightScheme()), torch.tensor(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2)}, "ids: expected dtype int64 or int32"),
        ({"ids": torch.zeros(2, dtype=torch.int8)}, "ids: expected dtype int64 or int32"),
        ({"embedding_dim": 15}, "embedding_dim: expected 16, got 15"),
        ({"embedding_dim": -1}, "embedding_dim: expected 16, got -1"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16"),
        ({"dtype": torch.int8}, "dtype: expected float32, bfloat16 or float16"),
        ({"perm": torch.arange(15, dtype=torch.int32)}, "perm: expected 16 elements"),
        ({"perm": torch.arange(16, dtype=torch.int32) + 1}, "perm: expected values in 0..15"),
        ({"perm": torch.zeros(16, dtype=torch.int32)}, "perm: expected a permutation"),
        ({"data": torch.zeros(64, dtype=torch.uint8)}, "packed: not a packed weight"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    data = ops.pack_weight(table(10, 16, WeightScheme())).data
    good = {"data": data, "ids": torch.zeros(2, dtype=torch.int64), "embedding_dim": 16}
    ops.woq_embedding(**good)
    with pytest.raises(RuntimeError, match=message):
        ops.woq_embedding(**{**good, **change})


def test_a_packed_weight_that_was_cut_short_is_refused() -> None:
    data = ops.pack_weight(table(10, 16, WeightScheme())).data
    with pytest.raises(RuntimeError, match="packed: expected"):
        ops.woq_embedding(data[:-64].clone(), torch.tensor([0]), 16)


def test_opcheck() -> None:
    packed = ops.pack_weight(shuffle_features(table(10, 16, WeightScheme(group_size=4))))
    op = torch.ops.ipex_quant.woq_embedding.default
    torch.library.opcheck(op, (packed.data, torch.tensor([[1, 2]]), packed.perm, 16, torch.bfloat16))
    torch.library.opcheck(op, (packed.data, torch.tensor([3], dtype=torch.int32), None, 16, torch.float32))
