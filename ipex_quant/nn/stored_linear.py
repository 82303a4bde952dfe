"""`StoredLinear`: a linear layer that reads its weight from a file whenever it needs it, while a model is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class StoredLinear(nn.Linear):
    """A float linear layer whose weight ``[out_features, in_features]`` is not in memory.

    Its parameter `weight` has the weight's shape and dtype, but takes the memory of one element: every value is NaN, so
    that whoever reads it instead of `read_weight` does not go unnoticed. Calls and the state dict have the real weight.
    Within `in_memory` the parameter holds it, and may be changed.
    """

    def __init__(self, like: nn.Linear, read: Callable[[], torch.Tensor], bias: torch.Tensor | None) -> None:
        """Replace the linear layer `like`, whose memory is not read; ``read()`` returns the weight in its dtype."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self._read = read
        stand_in = torch.full((1,), float("nan"), dtype=like.weight.dtype, device="cpu")
        self.weight = nn.Parameter(stand_in.expand(like.weight.shape), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias, were they in memory."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def read_weight(self) -> torch.Tensor:
        """The weight: that in memory, if it is, else a new tensor with that of the file."""
        return self._read() if is_stand_in(self.weight) else self.weight.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._read() if is_stand_in(self.weight) else self.weight  # one in memory may want a gradient
        return F.linear(x, weight, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.read_weight()


def is_stand_in(weight: torch.Tensor) -> bool:
    """Whether the values of a `StoredLinear`'s weight are not in memory."""
    return not any(weight.stride()) if weight.numel() > 1 else bool(weight.isnan().all())


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Hold the weights of every `StoredLinear` in `module` in memory within the context; changes to them are lost."""
    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, StoredLinear) and is_stand_in(layer.weight):
                stack.callback(setattr, layer.weight, "data", layer.weight.data)
                layer.weight.data = layer.read_weight()
        yield
