import pytest
import torch
from torch.ao.quantization import QConfigMapping

from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.quantization import (
    QConfigWoq,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    get_weight_only_quant_qconfig_mapping,
)

D, L, A, S = WoqWeightDtype, WoqLowpMode, WoqActQuantMode, WoqWeightQScheme


def qconfig(**options):
    return get_weight_only_quant_qconfig_mapping(**options).global_qconfig


def test_the_defaults_are_ipexs():
    mapping = get_weight_only_quant_qconfig_mapping()
    assert isinstance(mapping, QConfigMapping)
    result = mapping.global_qconfig
    assert isinstance(result, QConfigWoq)
    assert result[2:] == (L.NONE, A.NONE, D.INT8, -1, False, S.ASYMMETRIC, torch.float32)
    assert result._fields == (
        "activation",
        "weight",
        "lowp_mode",
        "act_quant_mode",
        "weight_dtype",
        "group_size",
        "cache_weight_for_large_batch",
        "weight_qscheme",
        "scale_dtype",  # not in IPEX
    )


def test_takes_keywords_only():
    with pytest.raises(TypeError):
        get_weight_only_quant_qconfig_mapping(D.INT4)


@pytest.mark.parametrize("lowp_mode", list(L))
def test_activations_are_quantized_for_int8_compute_only(lowp_mode):
    if lowp_mode == L.INT8:
        assert qconfig(lowp_mode=lowp_mode, act_quant_mode=A.PER_TENSOR).act_quant_mode == A.PER_TENSOR
        return
    assert qconfig(lowp_mode=lowp_mode).act_quant_mode == A.NONE
    with pytest.warns(UserWarning, match=f"act_quant_mode=PER_TENSOR has no effect: lowp_mode {lowp_mode.name}"):
        assert qconfig(lowp_mode=lowp_mode, act_quant_mode=A.PER_TENSOR).act_quant_mode == A.NONE


@pytest.mark.parametrize(
    ("weight_dtype", "lowp_mode", "expected"),
    [
        (D.INT8, L.NONE, S.ASYMMETRIC),
        (D.INT8, L.BF16, S.ASYMMETRIC),
        (D.INT8, L.INT8, S.SYMMETRIC),
        (D.INT4, L.INT8, S.ASYMMETRIC),
        (D.NF4, L.NONE, S.SYMMETRIC),
        (D.FP8, L.NONE, S.SYMMETRIC),
    ],
)
def test_an_undefined_scheme_is_resolved(weight_dtype, lowp_mode, expected):
    assert qconfig(weight_dtype=weight_dtype, lowp_mode=lowp_mode).weight_qscheme == expected


def test_a_given_scheme_is_kept():
    assert qconfig(weight_dtype=D.INT4, weight_qscheme=S.SYMMETRIC).weight_qscheme == S.SYMMETRIC
    assert qconfig(weight_dtype=D.INT4, weight_qscheme=S.ASYMMETRIC).weight_qscheme == S.ASYMMETRIC


@pytest.mark.parametrize("options", [{"weight_dtype": D.NF4}, {"weight_dtype": D.FP8}, {"lowp_mode": L.INT8}])
def test_asymmetric_weights_that_do_not_exist_raise(options):
    with pytest.raises(ValueError, match="Asymmetric quantization of weight is not supported when weight_dtype is"):
        qconfig(weight_qscheme=S.ASYMMETRIC, **options)


@pytest.mark.parametrize("group_size", [3, 0, -2, 48])
def test_a_group_size_is_a_power_of_two(group_size):
    message = f"Group size must be -1 or a positive power of 2, but got {group_size}"
    with pytest.raises(ValueError, match=message):
        qconfig(group_size=group_size)


def test_scales_are_in_float32_or_float16():
    assert qconfig(scale_dtype=torch.float16).scale_dtype == torch.float16
    with pytest.raises(ValueError, match=r"scale_dtype: expected torch\.float32 or torch\.float16, got torch\.int8"):
        qconfig(scale_dtype=torch.int8)


@pytest.mark.parametrize("group_size", [-1, 1, 4, 1024])
def test_powers_of_two_are_taken(group_size):
    assert qconfig(group_size=group_size).group_size == group_size


def test_unknown_values_raise():
    with pytest.raises(ValueError, match="Invalid weight data type for weight only quantization: 99"):
        qconfig(weight_dtype=99)


def test_int8_compute_needs_an_activation_mode():
    with pytest.raises(ValueError, match="act_quant_mode: lowp_mode INT8 quantizes activations"):
        qconfig(lowp_mode=L.INT8, act_quant_mode=A.NONE)


@pytest.mark.parametrize(("old", "new"), [(torch.qint8, D.INT8), (torch.quint4x2, D.INT4)])
def test_torch_dtypes_are_deprecated(old, new):
    with pytest.warns(DeprecationWarning, match=f"use WoqWeightDtype.{new.name}"):
        assert qconfig(weight_dtype=old).weight_dtype == new


@pytest.mark.parametrize(
    ("name", "choice"), [("lowp_mode", "BF16"), ("act_quant_mode", "PER_BATCH"), ("weight_qscheme", "SYM")]
)
def test_an_unknown_choice_lists_those_there_are(name, choice):
    with pytest.raises(ValueError, match=f"{name}: expected one of .*{choice}.*, got 9"):
        get_weight_only_quant_qconfig_mapping(**{name: 9})


def test_the_scheme_of_a_configuration():
    assert qconfig(weight_dtype=D.INT4, group_size=64).scheme == WeightScheme(D.INT4, False, 64)
    assert qconfig(weight_dtype=D.NF4).scheme == WeightScheme(D.NF4, True, -1)
    for symmetric, qscheme in ((True, S.SYMMETRIC), (False, S.ASYMMETRIC)):
        assert WeightScheme(D.INT8, symmetric).qscheme == qscheme
        assert qconfig(weight_qscheme=qscheme).scheme.symmetric is symmetric
