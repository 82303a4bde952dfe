"""Instruction set level that the native kernels run at."""

from __future__ import annotations

import warnings

from .library import native

ISA_LEVELS = ("generic", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "amx")
"""All levels, lowest first. Each includes those before it, but for ``avx2_vnni``, AVX-VNNI, which CPUs with AVX-512 may
lack."""

EMULATED_ISAS = ("avx2_vnni_emulated", "amx_emulated")
"""The kernels of two levels without the instructions that these add: for tests on CPUs that lack them, and slow."""


_LEVELS = (*ISA_LEVELS, *EMULATED_ISAS)


def supported_isas(emulated: bool = False) -> tuple[str, ...]:
    """Levels that this CPU can run, lowest first, and then, if asked for, those that are `emulated`.

    ``IPEX_QUANT_ISA`` may be any of them.
    """
    levels = _LEVELS if emulated else ISA_LEVELS
    return tuple(level for level in levels if native.isa_supported(_LEVELS.index(level)))


def isa_name() -> str:
    """Level in use: the highest supported one, or what the environment variable ``IPEX_QUANT_ISA`` lowers it to.

    The variable is read once per process. Raises ValueError when it names a level that is unknown or not supported.
    """
    try:
        return _LEVELS[native.isa_active()]
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def multiplies_bfloat16() -> bool:
    """Whether the level in use has products of bfloat16. Raises ValueError as `isa_name` does."""
    return isa_name() in ("avx512_bf16", "amx", "amx_emulated")


def warn_if_lowered() -> None:
    """Warn (RuntimeWarning) if the level in use is not the one that should be, since that failed its test."""
    try:
        reason = native.isa_lowered()
    except RuntimeError:  # IPEX_QUANT_ISA is wrong, which the first call of a kernel tells
        return
    if reason:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)


if native.isa_supported(ISA_LEVELS.index("amx")):
    warn_if_lowered()
