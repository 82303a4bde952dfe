"""The example that a model is run on once, to see which layers share their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.modes import evaluating


@dataclass(frozen=True)
class Example:
    """Arguments for one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, inputs: Any, kwarg_inputs: Any, needed: bool) -> Example | None:
        """The user's example for `model`, None without one.

        Raises ValueError when it is needed and there is none, when there are two, or when they do not fit the model's
        forward; TypeError when `kwarg_inputs` is no mapping.
        """
        if inputs is None and kwarg_inputs is None:
            if needed:
                raise ValueError(
                    "IPEX quantization.prepare: example_inputs and example_kwarg_inputs cannot be none at same time "
                    "for static quantization."
                )
            return None
        if inputs is not None and kwarg_inputs is not None:
            raise ValueError(
                "IPEX quantization.prepare: example_inputs and example_kwarg_inputs cannot be set at same time."
            )
        if kwarg_inputs is not None:
            if not isinstance(kwarg_inputs, Mapping):
                raise TypeError(
                    "IPEX quantization.prepare: example_kwarg_inputs must be type of Dict., got "
                    f"{type(kwarg_inputs).__name__}"
                )
            example = Example(kwargs=dict(kwarg_inputs))
        else:
            example = Example(tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,))
        example._check(model)
        return example

    def run(self, model: nn.Module) -> Any:
        """Call `model` in evaluation mode, without gradients; ValueError when that fails."""
        try:
            with evaluating(model), torch.no_grad():
                return model(*self.args, **self.kwargs)
        except Exception as error:
            raise ValueError(f"{self._source}: {type(model).__name__} cannot be called with it: {error}") from error

    @property
    def _source(self) -> str:
        return "example_kwarg_inputs" if self.kwargs else "example_inputs"

    def _check(self, model: nn.Module) -> None:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            names = ", ".join(signature.parameters)
            raise ValueError(f"{self._source}: {error}; {type(model).__name__}.forward takes {names}") from error
