"""What environment variables choose, and the logger of the plugin."""

from __future__ import annotations

import os

from vllm.logger import init_logger

from ...conversion.qconfig import DEFAULT_ACT_QUANT_MODE
from ...numerics.scheme import WoqActQuantMode, WoqLowpMode

logger = init_logger("vllm.ipex_quant")
"""Below vLLM's own logger, which has the handlers and the level that its users set."""

PARTS_VARIABLE = "IPEX_QUANT_VLLM"
LOWP_VARIABLE = "IPEX_QUANT_VLLM_LOWP"

_COMPUTE = {"int8": WoqLowpMode.INT8, "bf16": WoqLowpMode.BF16, "none": WoqLowpMode.NONE}

INT8_UP_TO = 4
"""Most bits of a weight that is multiplied with INT8 activations unless `LOWP_VARIABLE` says otherwise."""


def chosen_parts(known: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of the plugin that `PARTS_VARIABLE` names, separated by commas, by default all.

    Raises ValueError for an unknown one.
    """
    text = os.environ.get(PARTS_VARIABLE, "")
    names = tuple(part.strip() for part in text.split(",") if part.strip()) or known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{PARTS_VARIABLE}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def compute_modes(bits: int) -> tuple[WoqLowpMode, WoqActQuantMode]:
    """Compute and activation mode for weights of `bits` from checkpoints that state none.

    `LOWP_VARIABLE` is int8, bf16, or none for the dtype of the activations; raises ValueError for another value.
    """
    name = os.environ.get(LOWP_VARIABLE) or ("int8" if bits <= INT8_UP_TO else "none")
    if name not in _COMPUTE:
        raise ValueError(f"{LOWP_VARIABLE}: expected one of {', '.join(_COMPUTE)}, got {name!r}")
    lowp_mode = _COMPUTE[name]
    return lowp_mode, DEFAULT_ACT_QUANT_MODE if lowp_mode == WoqLowpMode.INT8 else WoqActQuantMode.NONE


def log_compute_mode(bits: int, lowp_mode: WoqLowpMode) -> None:
    """Log, once for each kind, how weights of `bits` are multiplied."""
    compute = {
        WoqLowpMode.INT8: "activations quantized to INT8",
        WoqLowpMode.BF16: "bfloat16 arithmetic",
    }.get(lowp_mode, "the arithmetic of the activations' dtype")
    logger.info_once("%d-bit weights are multiplied with %s (%s)", bits, compute, LOWP_VARIABLE)
