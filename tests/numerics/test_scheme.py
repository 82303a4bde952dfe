from __future__ import annotations

import pytest

from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme


def test_enumerations_keep_ipex_values() -> None:
    assert {d.name: d.value for d in WoqWeightDtype} == {"INT8": 1, "INT4": 2, "NF4": 3, "FP8": 4}
    assert [m.name for m in WoqLowpMode] == ["NONE", "FP16", "BF16", "INT8"]
    assert [m.value for m in WoqActQuantMode] == [-1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM == 7
    assert WoqActQuantMode.PER_BATCH_IC_BLOCK == 3
    assert [s.name for s in WoqWeightQScheme] == ["UNDEFINED", "ASYMMETRIC", "SYMMETRIC"]


@pytest.mark.parametrize(
    ("group_size", "in_features", "expected"), [(-1, 100, 1), (32, 96, 3), (32, 97, 4), (256, 5, 1), (1, 7, 7)]
)
def test_group_count(group_size: int, in_features: int, expected: int) -> None:
    assert WeightScheme(group_size=group_size).group_count(in_features) == expected


@pytest.mark.parametrize("group_size", [128.0, "128", True, None])
def test_group_size_must_be_an_int(group_size: object) -> None:
    with pytest.raises(TypeError, match=f"group_size: expected an int, got {group_size!r}"):
        WeightScheme(group_size=group_size)


@pytest.mark.parametrize("group_size", [0, 3, -2, 96])
def test_group_size_must_be_a_power_of_two(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size: expected -1 .* positive power of 2, got {group_size}"):
        WeightScheme(group_size=group_size)


@pytest.mark.parametrize("dtype", [WoqWeightDtype.NF4, WoqWeightDtype.FP8])
def test_codebook_dtypes_are_symmetric(dtype: WoqWeightDtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype.name} weights have no zero points"):
        WeightScheme(dtype, symmetric=False)


def test_unknown_dtype_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"INT8.*INT4.*NF4.*FP8.*got 9"):
        WeightScheme(9)


def test_dtype_may_be_an_integer_and_str_is_readable() -> None:
    assert WeightScheme(2).dtype is WoqWeightDtype.INT4
    assert str(WeightScheme(2, False, 64)) == "int4 asym g64"
    assert str(WeightScheme()) == "int8 sym per-channel"
