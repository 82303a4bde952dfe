import importlib

import pytest
import torch

from ipex_quant.alias import IPEX, install_as_ipex, uninstall_as_ipex

LEVELS = ["DEFAULT", "AVX2", "AVX2_VNNI", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX", "AVX512_FP16"]


@pytest.fixture
def core():
    install_as_ipex()
    yield importlib.import_module(f"{IPEX}._C")
    uninstall_as_ipex()


def test_levels_are_ipexs(core):
    current, cpu, binary = (
        LEVELS.index(level())
        for level in (
            core._get_current_isa_level,
            core._get_highest_cpu_support_isa_level,
            core._get_highest_binary_support_isa_level,
        )
    )
    assert current <= min(cpu, binary)
    assert core._check_not_sync_onednn_isa_level()


def test_levels_imply_each_other(core):
    chain = [
        core.isa_has_amx_fp16_support(),
        core.isa_has_amx_support(),
        core.isa_has_avx512_bf16_support(),
        core.isa_has_avx512_vnni_support(),
        core.isa_has_avx512_support(),
        core.isa_has_avx2_support(),
    ]
    assert chain == sorted(chain)
    assert isinstance(core.isa_has_avx2_vnni_support(), bool)
    assert core.onednn_has_bf16_support() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert core.onednn_has_fp16_support() == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not core.onednn_has_fp8_support()


def test_fusion_is_switched(core):
    try:
        for switch, expected in (
            (core.enable_jit_opt, True),
            (core.disable_jit_opt, False),
            (lambda: core.set_llga_fp32_bf16_enabled(True), True),
        ):
            switch()
            assert core.is_llga_fp32_bf16_enabled() == torch.jit.onednn_fusion_enabled() == expected
    finally:
        torch.jit.enable_onednn_fusion(False)


def test_switches_without_a_counterpart(core):
    for switch in ("enable_jit_linear_repack", "disable_jit_linear_repack", "disable_jit_concat_linear"):
        assert getattr(core, switch)() is None
    core.xsmm_manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), expected)
