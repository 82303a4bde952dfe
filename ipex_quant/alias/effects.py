"""What importing IPEX did to torch, and scripts rely on: done for the alias, and taken back."""

from __future__ import annotations

import functools
import inspect
import logging
from abc import ABCMeta
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear

from ..frontend.optimization import optimize
from ..nn import Int8Linear, WeightOnlyQuantizedLinear
from ..settings import compile


def effects() -> list[AbstractContextManager[None]]:
    """A context manager for each effect."""
    return [
        _compile_backend(),
        _uncached_tracing(),
        _traces_as_traced(),
        _bfloat16_arrays(),
        _xpu_optimize(),
        _dynamic_linear(),
        _lowp_mode(),
        _ipex_logger(),
    ]


@contextmanager
def _compile_backend() -> Iterator[None]:
    """The name "ipex" for `torch.compile`: `ipex_quant.settings.compile`."""
    from torch._dynamo.backends import registry  # takes as long as torch

    registry.register_backend(compile, name="ipex")
    yield
    registry._BACKENDS.pop("ipex", None)
    registry._COMPILER_FNS.pop("ipex", None)


def _with_cache_name(func: Any = None, *_: Any, **kwargs: Any) -> dict[str, Any]:
    """`kwargs` of `torch.jit.trace`, with the cache in its example named as `func`, a model, names it."""
    example = kwargs.get("example_kwarg_inputs")
    if example is None or not isinstance(func, nn.Module):
        return kwargs
    from ..llm.cache.naming import cache_name, with_cache_name  # takes as long as transformers

    return kwargs | {"example_kwarg_inputs": with_cache_name(example, cache_name(func.forward))}


@contextmanager
def _uncached_tracing() -> Iterator[None]:
    """`torch.jit.trace` for scripts of IPEX.

    Under autocast, its cache of cast weights would put tensors with gradients into the graph. Examples by name say
    `past_key_values`, which later releases of transformers name otherwise.
    """
    jit: Any = torch.jit
    trace = jit.trace

    @functools.wraps(trace)
    def trace_without_cache(*args: Any, **kwargs: Any) -> Any:
        enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return trace(*args, **_with_cache_name(*args, **kwargs))
        finally:
            torch.set_autocast_cache_enabled(enabled)

    jit.trace = trace_without_cache
    yield
    if jit.trace is trace_without_cache:
        jit.trace = trace


@contextmanager
def _traces_as_traced() -> Iterator[None]:
    """Graphs traced under autocast run as traced, with autocast's casts in them; torch would add casts of its own."""
    added = torch._C._jit_set_autocast_mode(False)
    yield
    torch._C._jit_set_autocast_mode(added)


@contextmanager
def _bfloat16_arrays() -> Iterator[None]:
    """``Tensor.numpy`` of a bfloat16 tensor: a float32 array, where torch raises TypeError."""
    tensor: Any = torch.Tensor
    numpy = tensor.numpy

    @functools.wraps(numpy)
    def numpy_of_any(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return numpy(self.float() if self.dtype == torch.bfloat16 else self, *args, **kwargs)

    tensor.numpy = numpy_of_any
    yield
    if tensor.numpy is numpy_of_any:
        tensor.numpy = numpy


@contextmanager
def _xpu_optimize() -> Iterator[None]:
    """``torch.xpu.optimize``: `ipex_quant.optimize` for models on an XPU; what is for CPUs alone is left out."""

    @functools.wraps(optimize)
    def optimize_for_xpu(*args: Any, **kwargs: Any) -> Any:
        if not torch.xpu.is_available():
            raise RuntimeError("torch.xpu.optimize: torch finds no XPU; use ipex.optimize on CPUs")
        call = inspect.signature(optimize).bind(*args, **kwargs)
        for name in ("weights_prepack", "optimize_lstm", "fuse_update_step", "split_master_weight_for_bf16"):
            call.arguments.setdefault(name, False)
        return optimize(*call.args, **call.kwargs)

    xpu: Any = torch.xpu
    xpu.optimize = optimize_for_xpu
    yield
    del xpu.optimize


class _AlsoOurs(ABCMeta):
    """The metaclass of torch's dynamic linear layer while dynamic `Int8Linear` modules are instances of it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        return cls is Linear and isinstance(instance, Int8Linear) and instance.activation is None


@contextmanager
def _dynamic_linear() -> Iterator[None]:
    """`isinstance` of ``torch.nn.quantized.dynamic.Linear``: scripts look for what was quantized by it."""
    layer: Any = Linear
    layer.__class__ = _AlsoOurs  # `ABCMeta.register` could not be taken back, nor tell static modules apart
    yield
    layer.__class__ = ABCMeta


@contextmanager
def _lowp_mode() -> Iterator[None]:
    """IPEX's name of `WeightOnlyQuantizedLinear.lowp_mode`, which scripts look up to see whether it was obeyed."""
    layer: Any = WeightOnlyQuantizedLinear
    layer._lowp_mode = property(lambda self: self.lowp_mode)
    yield
    del layer._lowp_mode


def _pass_to_ipex(record: logging.LogRecord) -> bool:
    """Filter of a logger: gives `record` to the logger "IPEX", by whose name scripts look for it, and to no other."""
    target = logging.getLogger("IPEX")
    if record.levelno >= target.level:
        target.handle(logging.makeLogRecord({**record.__dict__, "name": target.name}))
    return False


@contextmanager
def _ipex_logger() -> Iterator[None]:
    """Messages of this package are those of the logger "IPEX"."""
    logger = logging.getLogger("ipex_quant")
    logger.addFilter(_pass_to_ipex)
    yield
    logger.removeFilter(_pass_to_ipex)
