"""`compile`: what IPEX gave to `torch.compile` as its backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

BACKENDS = ("inductor", "torchscript")


class _Setting:
    backend = "inductor"


def get_compiler_backend() -> str:
    """What `compile` uses."""
    return _Setting.backend


def set_compiler_backend(backend: str = "inductor") -> None:
    """Let `compile` use `backend`, "inductor" or "torchscript", for the process; RuntimeError for another one."""
    if backend not in BACKENDS:
        raise RuntimeError(f"Unexpected compilation path {backend}: expected one of {', '.join(BACKENDS)}")
    _Setting.backend = backend


def compile(  # IPEX's name
    model: torch.fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile the graph `model`: a backend for ``torch.compile(module, backend=compile)``.

    `mode` and `options` are those of `torch.compile`, and count for "inductor". Without a C++ compiler the graph runs
    as it is, with a warning. With "torchscript" (`set_compiler_backend`) it is traced and frozen when it is first
    called, and runs as it is where that fails, or where gradients are wanted.
    """
    if get_compiler_backend() == "torchscript":
        return _Traced(model)
    from torch._inductor import list_mode_options  # slow to load
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InvalidCxxCompiler

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    try:
        compiled: Any = compile_fx(model, list(example_inputs), config_patches=patches)
    except Exception as error:
        if not isinstance(getattr(error, "inner_exception", error), InvalidCxxCompiler):
            raise
        warnings.warn(f"the model runs without being compiled; install a C++ compiler (g++): {error}", stacklevel=2)
        return model.forward
    return compiled


class _Traced:
    """Runs a graph through TorchScript; by itself after tracing failed, and where gradients are wanted."""

    def __init__(self, model: torch.fx.GraphModule) -> None:
        self.model = model
        self._traced: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*self.model.parameters(), *args) if isinstance(tensor, torch.Tensor)
        ):
            return self.model(*args)
        if self._traced is None:
            self._traced = self._trace(args)
        return self._traced(*args)

    def _trace(self, args: Sequence[Any]) -> Callable[..., Any]:
        with torch.no_grad():
            try:
                return torch.jit.freeze(torch.jit.trace(self.model.eval(), tuple(args)))
            except Exception as error:  # whatever TorchScript refuses
                warnings.warn(f"the model runs without being traced: {error}", stacklevel=4)
                return self.model
