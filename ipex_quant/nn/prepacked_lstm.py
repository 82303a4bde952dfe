"""LSTMs in bfloat16 and float16 on CPUs that compute in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .prepacked import Derived, Prepacked, compute_dtype, result_dtype


class PrepackedLSTM(Prepacked):
    """The forward of an ``nn.LSTM``: in `compute_dtype`, with copies of its weights, where that is another dtype.

    Where it is not, torch's own forward is oneDNN's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._weights = [Derived() for _ in module._flat_weights_names]

    def __call__(self, input: Any, hx: tuple[torch.Tensor, torch.Tensor] | None = None) -> Any:
        values = input.data if isinstance(input, PackedSequence) else input
        weights = [getattr(self.module, name) for name in self.module._flat_weights_names]
        dtype = result_dtype(values, weights[0])
        computed = None if dtype is None else compute_dtype(dtype)
        if dtype is None or values.dtype == computed == dtype:
            return type(self.module).forward(self.module, input, hx)
        if self._is_observed(values, *weights, *(hx or ())):
            cast = [weight.to(computed) for weight in weights]
        else:
            pairs = zip(self._weights, weights, strict=True)
            cast = [derived.of([w], computed, lambda w=w: w.to(computed)) for derived, w in pairs]
        with torch.autocast("cpu", enabled=False):
            state = None if hx is None else tuple(x.to(computed) for x in hx)
            output, state = self._with_weights(cast)(input.to(computed), state)
        return output.to(dtype), tuple(x.to(dtype) for x in state)

    def _with_weights(self, weights: list[torch.Tensor]) -> nn.Module:
        """The LSTM with other weights, for one call."""
        self.module._update_flat_weights()  # else the forward would, of the parameters
        lstm = type(self.module).__new__(type(self.module))
        vars(lstm).update({**vars(self.module), "_flat_weights": weights})
        del lstm.forward
        return lstm
