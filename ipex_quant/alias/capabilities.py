"""``intel_extension_for_pytorch._C``: what public scripts ask of it."""

from __future__ import annotations

from pathlib import Path

import torch

from ..cpu.binding import bind
from ..cpu.runtime import CPUPool
from ..ops import ISA_LEVELS, isa_name, supported_isas
from ..settings import enable_onednn_fusion

_IPEX_LEVELS = {"generic": "DEFAULT"}
"""IPEX's names of the instruction set levels, where they are not those of this package in upper case."""


def get_current_cpu_pool() -> CPUPool:
    """The cores that the calling thread may run on."""
    return CPUPool()


def set_cpu_pool(cpu_pool: CPUPool) -> None:
    """Compute on the cores of `cpu_pool` from now on, in the calling thread."""
    bind(cpu_pool.core_ids)


def _get_current_isa_level() -> str:
    return _ipex_level(isa_name())


def _get_highest_cpu_support_isa_level() -> str:
    return _ipex_level(supported_isas()[-1])


def _get_highest_binary_support_isa_level() -> str:
    return _ipex_level(ISA_LEVELS[-1])


def _check_not_sync_onednn_isa_level() -> bool:
    """Whether oneDNN keeps its own level whatever that of this package is: always."""
    return True


def _ipex_level(level: str) -> str:
    return _IPEX_LEVELS.get(level, level.upper())


def isa_has_avx2_support() -> bool:
    """Whether the CPU has AVX2."""
    return torch.cpu._is_avx2_supported()


def isa_has_avx2_vnni_support() -> bool:
    """Whether the CPU has AVX-VNNI, as far as Linux tells."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx_vnni" in cpuinfo.read_text(encoding="utf-8").split()


def isa_has_avx512_support() -> bool:
    """Whether the CPU has AVX-512."""
    return torch.cpu._is_avx512_supported()


def isa_has_avx512_vnni_support() -> bool:
    """Whether the CPU has AVX512-VNNI."""
    return torch.cpu._is_vnni_supported()


def isa_has_avx512_bf16_support() -> bool:
    """Whether the CPU has AVX512-BF16."""
    return torch.cpu._is_avx512_bf16_supported()


def isa_has_amx_support() -> bool:
    """Whether the CPU has AMX."""
    return torch.cpu._is_amx_tile_supported()


def isa_has_amx_fp16_support() -> bool:
    """Whether the CPU has AMX-FP16."""
    return torch.cpu._is_amx_fp16_supported()


def onednn_has_bf16_support() -> bool:
    """Whether torch's oneDNN computes in bfloat16 on this CPU; the kernels of this package do on every one."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_has_fp16_support() -> bool:
    """Whether torch's oneDNN computes in float16 on this CPU; the kernels of this package do on every one."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def onednn_has_fp8_support() -> bool:
    """Whether FP8 linears train through oneDNN: no."""
    return False


def enable_jit_opt() -> None:
    """Call ``enable_onednn_fusion(True)``."""
    enable_onednn_fusion(True)


def disable_jit_opt() -> None:
    """Call ``enable_onednn_fusion(False)``."""
    enable_onednn_fusion(False)


def set_llga_fp32_bf16_enabled(enabled: bool) -> None:
    """Call `enable_onednn_fusion`."""
    enable_onednn_fusion(enabled)


def is_llga_fp32_bf16_enabled() -> bool:
    """Whether `enable_onednn_fusion` is on."""
    return torch.jit.onednn_fusion_enabled()


def change_no_graphs() -> None:
    """Do nothing: traced graphs are run as they are; weights were packed, and linear layers joined, before."""


enable_jit_linear_repack = disable_jit_linear_repack = change_no_graphs
enable_jit_concat_linear = disable_jit_concat_linear = change_no_graphs
