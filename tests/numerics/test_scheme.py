from __future__ import annotations

import pytest

from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype, WoqWeightQScheme


def test_enumerations_keep_ipex_values() -> None:
    assert [d.name for d in WoqWeightDtype][:4] == ["INT8", "INT4", "NF4", "FP8"]
    assert [d.value for d in WoqWeightDtype] == list(range(1, 12))
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
    with pytest.raises(ValueError, match=r"INT8.*INT4.*NF4.*FP8.*got 99"):
        WeightScheme(99)


@pytest.mark.parametrize(
    ("dtype", "bits", "is_integer", "fits_int8"),
    [
        ("INT8", 8, True, True),
        ("INT3", 3, True, True),
        ("NF4", 4, False, True),
        ("FP8", 8, False, False),
        ("FP4", 4, False, True),
        ("IQ4", 4, False, True),
        ("BNB_FP4", 4, False, False),
    ],
)
def test_bits_and_kind_of_a_dtype(dtype: str, bits: int, is_integer: bool, fits_int8: bool) -> None:
    assert WoqWeightDtype[dtype].bits == bits
    assert WoqWeightDtype[dtype].has_integers is is_integer
    assert WoqWeightDtype[dtype].fits_int8 is fits_int8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WoqWeightDtype.INT4, True, 32, True), "minimums: symmetric weights have none"),
        ((WoqWeightDtype.INT4, True, 32, False, 16), "super_group_size: expected one or more groups of 32, got 16"),
        ((WoqWeightDtype.INT4, True, -1, False, 64), "super_group_size: expected one or more groups of -1, got 64"),
        ((WoqWeightDtype.INT4, True, 32, False, 96), "group_size: expected -1 .* positive power of 2, got 96"),
    ],
)
def test_storage_that_does_not_exist(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightScheme(*arguments)


def test_super_groups_divide_the_input_features() -> None:
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32, True, 256)
    assert scheme.super_count(512) == 2
    assert str(scheme) == "int4 min g32 in g256"
    assert WeightScheme(WoqWeightDtype.FP4, True, 16, super_group_size=-1).super_count(48) == 1
    with pytest.raises(ValueError, match="expected a divisor of 300 input features, got 256"):
        scheme.super_count(300)


def test_dtype_may_be_an_integer_and_str_is_readable() -> None:
    assert WeightScheme(2).dtype is WoqWeightDtype.INT4
    assert str(WeightScheme(2, False, 64)) == "int4 asym g64"
    assert str(WeightScheme()) == "int8 sym per-channel"
