"""Running a model as compiled graphs, and as it is where that fails."""

from __future__ import annotations

import types
import warnings
from typing import Any

import torch
from torch import nn

from ..nn.fused_forward import FusedForward


class CompiledForward(FusedForward):
    """Replaces the `forward` of a model by graphs that `torch.compile` makes when it is first called.

    Where they cannot be made, a UserWarning says why, and the model runs as it is from then on. `torch.jit` and
    `torch.export` see the model as it is. Graphs are neither saved nor copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._compiled: Any = None
        self._fails = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = types.MethodType(type(self.model).forward, self.model)
        if self._fails or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return forward(*args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(forward)
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # loaded by now, and slow to load

            if not isinstance(error, TorchDynamoException):
                raise
            result = forward(*args, **kwargs)  # raises if the arguments are to blame
            warnings.warn(f"graph_mode: the model runs without graphs, since they failed: {error}", stacklevel=2)
            self._fails = True
            return result


def use_graphs(model: nn.Module) -> None:
    """Let `model` run as graphs, in place, unless its forward is replaced already."""
    if "forward" not in vars(model):
        model.forward = CompiledForward(model)
