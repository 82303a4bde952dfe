"""`Example`: arguments for one call of a model, from a user or from a dataloader."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, ArgumentTypeError
from ..nn.modes import evaluating


class ExampleError(ValueError):
    """A model cannot be called with an example."""


@dataclass(frozen=True)
class Example:
    """Arguments for one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    """What errors call it; by default the name of an argument of `prepare`."""

    @staticmethod
    def of(model: nn.Module, inputs: Any, kwarg_inputs: Any, needed: bool) -> Example | None:
        """The user's example for `model`: positional `inputs` or `kwarg_inputs`; None if both are None.

        A mapping as `inputs` is the arguments by name, unless its names do not fit and the forward takes one argument.

        Raises ValueError if an example is `needed` and none given, and if both are given; ExampleError if it is
        `needed` and does not fit the model's forward; TypeError if `kwarg_inputs` is no mapping.
        """
        if inputs is None and kwarg_inputs is None:
            if needed:
                raise ArgumentError(
                    "IPEX quantization.prepare: example_inputs and example_kwarg_inputs cannot be none at same time "
                    "for static quantization."
                )
            return None
        if inputs is not None and kwarg_inputs is not None:
            raise ArgumentError(
                "IPEX quantization.prepare: example_inputs and example_kwarg_inputs cannot be set at same time."
            )
        if kwarg_inputs is not None:
            if not isinstance(kwarg_inputs, Mapping):
                raise ArgumentTypeError(
                    "IPEX quantization.prepare: example_kwarg_inputs must be type of Dict., got "
                    f"{type(kwarg_inputs).__name__}"
                )
            example = Example(kwargs=dict(kwarg_inputs))
        elif isinstance(inputs, Mapping) and (_takes(model, **inputs) or not _takes(model, inputs)):
            example = Example(kwargs=dict(inputs), source="example_inputs")
        else:
            example = Example(tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,))
        if needed:
            example._check(model)
        return example

    @staticmethod
    def of_item(model: nn.Module, item: Any, source: str) -> Example:
        """The arguments for `model` in one item of a dataloader.

        An item is a mapping of the forward's arguments, a tuple or list of them, one tensor, or a pair of one of these
        and a value that is no argument: the index of the last token, or a label. Raises TypeError, which names the
        `source`, for anything else.
        """
        if isinstance(item, (tuple, list)) and len(item) == 2 and _is_inputs(item[0]) and _is_aside(model, *item):
            item = item[0]
        if isinstance(item, Mapping) and item:
            return Example(kwargs=dict(item))
        if isinstance(item, torch.Tensor):
            return Example((item,))
        if isinstance(item, (tuple, list)) and item:
            return Example(tuple(item))
        empty = "an empty " if isinstance(item, (Mapping, tuple, list)) else ""
        raise TypeError(
            f"{source}: expected items that are a mapping, a tuple, a list or a tensor, or a pair of one of these and "
            f"an index or label, got {empty}{type(item).__name__}"
        )

    def by_name(self, model: nn.Module) -> dict[str, Any]:
        """The arguments as keywords of the forward of `model`."""
        return {**inspect.signature(model.forward).bind_partial(*self.args).arguments, **self.kwargs}

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors among the arguments."""
        yield from (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor))

    @property
    def sample_count(self) -> int:
        """The number of samples: the length of the first tensor, or 1."""
        return next((len(tensor) for tensor in self.tensors() if tensor.dim()), 1)

    def run(self, model: nn.Module) -> Any:
        """Call `model` in evaluation mode, without gradients, and return its result; ExampleError if it fails."""
        try:
            with evaluating(model), torch.no_grad():
                return model(*self.args, **self.kwargs)
        except Exception as error:
            raise ExampleError(f"{self._source}: {type(model).__name__} cannot be called with it: {error}") from error

    @property
    def _source(self) -> str:
        return self.source or ("example_kwarg_inputs" if self.kwargs else "example_inputs")

    def _check(self, model: nn.Module) -> None:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            names = ", ".join(signature.parameters)
            raise ExampleError(f"{self._source}: {error}; {type(model).__name__}.forward takes {names}") from error


def _is_inputs(value: Any) -> bool:
    return isinstance(value, (Mapping, tuple, list, torch.Tensor))


def _takes(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the forward of `model` has parameters for these arguments."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _is_aside(model: nn.Module, inputs: Any, other: Any) -> bool:
    """Whether `other` is no argument.

    It is none if `inputs` is a collection, if the model takes one argument, or if it has one integer per sample.
    """
    if not isinstance(inputs, torch.Tensor):
        return True
    if not _takes(model, inputs):
        return False
    if not _takes(model, inputs, other):
        return True
    if isinstance(other, torch.Tensor):
        whole = not other.is_floating_point() and not other.is_complex()
        return whole and other.dim() <= 1 < inputs.dim() and other.numel() in (1, len(inputs))
    return isinstance(other, (int, str)) or (isinstance(other, Sequence) and all(isinstance(n, int) for n in other))
