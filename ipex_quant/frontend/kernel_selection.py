"""Choosing, for every prepacked layer, the faster of its forwards on an example of inputs."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..conversion.example import Example
from ..nn.fused_forward import FusedForward, fused_forward
from ..nn.prepacked import Prepacked, restore_prepacked
from ..nn.prepacked_group import GroupedLinear

logger = logging.getLogger("ipex_quant")

_ROUNDS = 3
_WARM_UP = 2  # the second call with a shape packs the weight


def select_kernels(model: nn.Module, example: Example) -> None:
    """Let each prepacked layer of `model` that is slower so in a run of `example` compute by its stock forward.

    Layers that are computed together stay.
    """
    seconds: dict[nn.Module, list[float]] = defaultdict(lambda: [0.0, 0.0])
    layers = {name: module for name, module in model.named_modules() if _is_alone(fused_forward(module))}
    handles = [m.register_forward_pre_hook(partial(_compare, seconds), with_kwargs=True) for m in layers.values()]
    try:
        example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in layers.items():
        stock, prepacked = seconds[module]
        if stock < prepacked:
            restore_prepacked(module)
            logger.info("auto_kernel_selection: %s is not prepacked", name)


def _is_alone(forward: FusedForward | None) -> bool:
    return isinstance(forward, Prepacked) and not isinstance(forward, GroupedLinear)


def _compare(
    seconds: dict[nn.Module, list[float]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    forwards = (partial(type(module).forward, module), module.forward)
    for forward in forwards * _WARM_UP:
        forward(*args, **kwargs)
    rounds = [[_seconds(forward, args, kwargs) for forward in forwards] for _ in range(_ROUNDS)]
    for index, times in enumerate(zip(*rounds, strict=True)):
        seconds[module][index] += min(times)


def _seconds(forward: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    start = time.perf_counter()
    forward(*args, **kwargs)
    return time.perf_counter() - start
