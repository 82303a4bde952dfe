"""Instruction set level that the native kernels run at."""

from __future__ import annotations

from .library import native

ISA_LEVELS = ("generic", "avx2", "avx512_vnni", "avx512_bf16")
"""All levels, lowest first; each includes those before it. ``avx2`` uses AVX-VNNI where the CPU has it."""


def supported_isas() -> tuple[str, ...]:
    """Levels that this CPU can run, lowest first; ``IPEX_QUANT_ISA`` may be any of them."""
    return ISA_LEVELS[: native.isa_supported() + 1]


def isa_name() -> str:
    """Level in use: the highest supported one, or what the environment variable ``IPEX_QUANT_ISA`` lowers it to.

    The variable is read once per process. Raises ValueError when it names a level that is unknown or not supported.
    """
    try:
        return ISA_LEVELS[native.isa_active()]
    except RuntimeError as error:
        raise ValueError(str(error)) from None
