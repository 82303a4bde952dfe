import pytest
import torch

import ipex_quant as ipex
from ipex_quant import FP32MathMode


@pytest.fixture(autouse=True)
def exact_again():
    yield
    ipex.set_fp32_math_mode()


@pytest.mark.parametrize(
    ("mode", "precision", "matmul"),
    [
        (FP32MathMode.BF32, "bf16", "medium"),
        (FP32MathMode.TF32, "tf32", "high"),
        (FP32MathMode.FP32, "ieee", "highest"),
    ],
)
def test_it_is_torchs_own_setting(mode, precision, matmul):
    ipex.set_fp32_math_mode(FP32MathMode.BF32)
    ipex.set_fp32_math_mode(mode=mode, device="cpu")
    onednn = torch.backends.mkldnn
    assert [part.fp32_precision for part in (onednn.matmul, onednn.conv, onednn.rnn)] == [precision] * 3
    assert torch.get_float32_matmul_precision() == matmul
    assert ipex.get_fp32_math_mode() is ipex.get_fp32_math_mode("cpu") is mode


def test_what_torch_was_told_is_what_is_got():
    torch.set_float32_matmul_precision("medium")
    assert ipex.get_fp32_math_mode() == FP32MathMode.BF32
    ipex.set_fp32_math_mode()
    assert ipex.get_fp32_math_mode() == FP32MathMode.FP32


def test_bad_arguments_change_nothing():
    with pytest.raises(ValueError, match="expected a FP32MathMode, got 'BF32'"):
        ipex.set_fp32_math_mode("BF32")
    for call in (lambda d: ipex.set_fp32_math_mode(FP32MathMode.BF32, d), ipex.get_fp32_math_mode):
        with pytest.raises(RuntimeError, match="Unexpected device type cuda"):
            call("cuda")
        with pytest.raises(RuntimeError, match="no XPU"):
            call("xpu")
    assert ipex.get_fp32_math_mode() == FP32MathMode.FP32
