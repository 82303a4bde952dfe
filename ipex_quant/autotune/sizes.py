"""The bytes of a model's weights, the memory bandwidth, and the time of a decode step."""

from __future__ import annotations

import logging
import math
import time
from statistics import median

import torch
from torch import nn

from ..llm.cache.naming import CACHE
from ..nn import QuantizedModule
from ..nn.linears import is_linear, weight_matrix

logger = logging.getLogger("ipex_quant")

_STEPS = 12
_PROMPT = 8
_BUFFER = 1 << 27
"""Bytes that the measurement of the read bandwidth reads: more than the CPU's caches hold."""


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes and number of the weights that a decode step reads: of quantized modules and of linear layers in float."""
    total = count = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue  # a step reads one row
        if isinstance(module, QuantizedModule):
            total += module.nbytes
            count += math.prod(module.weight_shape)
        elif is_linear(module):
            weight = weight_matrix(module)
            total += weight.numel() * weight.element_size()
            count += weight.numel()
    return total, count


def read_bandwidth() -> float:
    """Bytes per second that torch reads from memory in one sum: the best of several rounds."""
    buffer = torch.ones(_BUFFER // 8, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return _BUFFER / min(seconds)


@torch.inference_mode()
def decode_step_ms(model: nn.Module) -> float | None:
    """Milliseconds of one decode step with a short cache, the median of several; None if the model does not decode."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return None
    ids = torch.arange(1, _PROMPT + 1)[None] % model.config.get_text_config().vocab_size
    times = []
    try:
        output = model(input_ids=ids, use_cache=True)
        for _ in range(_STEPS):
            start = time.perf_counter()
            output = model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: output[CACHE]})
            times.append(time.perf_counter() - start)
    except Exception as error:  # tuning goes on without a time
        logger.debug("no decode step was timed: %r", error)
        return None
    return 1e3 * median(times)
