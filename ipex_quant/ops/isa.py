"""Instruction set level that the native kernels run at."""

from __future__ import annotations

import warnings

from .library import native

ISA_LEVELS = ("generic", "avx2", "avx512_vnni", "avx512_bf16", "amx")
"""All levels, lowest first; each includes those before it. ``avx2`` uses AVX-VNNI where the CPU has it."""

EMULATED_ISA = "amx_emulated"
"""The kernels of ``amx`` without any of its instructions: for tests on CPUs that lack them, and slow."""


def supported_isas() -> tuple[str, ...]:
    """Levels that this CPU can run, lowest first; ``IPEX_QUANT_ISA`` may be any of them."""
    return ISA_LEVELS[: native.isa_supported() + 1]


def isa_name() -> str:
    """Level in use: the highest supported one, or what the environment variable ``IPEX_QUANT_ISA`` lowers it to.

    The variable is read once per process. Raises ValueError when it names a level that is unknown or not supported.
    """
    try:
        return (*ISA_LEVELS, EMULATED_ISA)[native.isa_active()]
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def multiplies_bfloat16() -> bool:
    """Whether the level in use has products of bfloat16. Raises ValueError as `isa_name` does."""
    return isa_name() in ("avx512_bf16", "amx", EMULATED_ISA)


def warn_if_lowered() -> None:
    """Warn (RuntimeWarning) if the level in use is not the one that should be, since that failed its test."""
    try:
        reason = native.isa_lowered()
    except RuntimeError:  # IPEX_QUANT_ISA is wrong, which the first call of a kernel tells
        return
    if reason:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)


if native.isa_supported() >= ISA_LEVELS.index("amx"):
    warn_if_lowered()
