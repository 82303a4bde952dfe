"""`Storage`: the stored form of a cache layer's keys or values, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...nn.deferred import DeferredTensor
from ...ops import attention
from ...ops.gradient import needs_function
from ...ops.reference_attention import attention as differentiable_attention


class StoredTensor(DeferredTensor):
    """Keys or values ``[B, Hkv, T, D]`` as a deferred tensor, which is computed from a `Storage` when read."""

    @staticmethod
    def __new__(
        cls,
        stored: torch.Tensor,
        scales: torch.Tensor | None,
        rows: torch.Tensor | None,
        dtype: torch.dtype,
        factors: torch.Tensor | None = None,
    ) -> StoredTensor:
        batch = len(stored if rows is None else rows)
        return DeferredTensor.__new__(cls, (batch, *stored.shape[1:]), dtype, stored.device)

    def __init__(
        self,
        stored: torch.Tensor,
        scales: torch.Tensor | None,
        rows: torch.Tensor | None,
        dtype: torch.dtype,
        factors: torch.Tensor | None = None,
    ):
        self.stored, self.scales, self.rows, self.factors = stored, scales, rows, factors

    def _compute(self) -> torch.Tensor:
        stored = self._in_order(self.stored)
        if self.scales is not None:
            stored = stored.float() * self._in_order(self.scales).unsqueeze(-1)
        if self.factors is not None:
            stored = stored * self.factors[:, None]
        return stored.to(self.dtype)

    def _in_order(self, stored: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return stored
        return stored[self.rows.long(), :, torch.arange(stored.shape[2], device=stored.device)].transpose(1, 2)

    # torch.compile takes tensor subclasses apart with these

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return [name for name in ("stored", "scales", "rows", "factors") if getattr(self, name) is not None], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], dtype: torch.dtype, *_: Any) -> StoredTensor:
        return StoredTensor(parts["stored"], parts.get("scales"), parts.get("rows"), dtype, parts.get("factors"))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (tensor,) = args
            return StoredTensor(tensor.stored, tensor.scales, tensor.rows, tensor.dtype, tensor.factors)
        return super().__torch_dispatch__(function, types, args, kwargs)


@torch.compiler.allow_in_graph
def _stored_tensor(*parts: Any) -> StoredTensor:
    return StoredTensor(*parts)


@dataclass(frozen=True)
class Storage:
    """The stored keys, or the stored values, of a cache layer.

    `stored` is ``[R, Hkv, T, D]`` in a float dtype, or int8 with `scales`, float32 ``[R, Hkv, T]``. Position t of
    sequence b is in row ``rows[b, t]`` (int32 ``[B, T]``), or without `rows` in row b. `dtype` is the model's. The
    channels of int8 keys were divided by `factors`, float32 ``[Hkv, D]``.
    """

    stored: torch.Tensor
    scales: torch.Tensor | None
    rows: torch.Tensor | None
    dtype: torch.dtype
    factors: torch.Tensor | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Storage:
        """The storage behind a tensor that the method `tensor` returned, or of any ``[B, Hkv, T, D]`` tensor."""
        if isinstance(tensor, StoredTensor):
            return cls(tensor.stored, tensor.scales, tensor.rows, tensor.dtype, tensor.factors)
        return cls(tensor if tensor.stride(-1) == 1 else tensor.contiguous(), None, None, tensor.dtype)

    @property
    def batch(self) -> int:
        return len(self.stored if self.rows is None else self.rows)

    def tensor(self) -> torch.Tensor:
        """The keys or values as a tensor ``[B, Hkv, T, D]`` in the model's dtype, for the model's own code."""
        # Models may view sequences and heads as one dimension, as they can after a concatenation.
        regular = self.stored.stride(0) == self.stored.shape[1] * self.stored.stride(1)
        if self.scales is None and self.rows is None and self.stored.dtype == self.dtype and regular:
            return self.stored
        return _stored_tensor(self.stored, self.scales, self.rows, self.dtype, self.factors)


def attend(query: torch.Tensor, keys: Storage, values: Storage, **options: Any) -> torch.Tensor:
    """Attention of `query` ``[B, H, Lq, D]`` over stored keys and values; `options` are those of `ops.attention`.

    Returns ``[B, Lq, H, Dv]`` in the dtype of `query`. If keys and values have another float dtype than the query, it
    computes in theirs. If gradients are needed, outside of `torch.jit.trace`, or with the further option `dropout`, it
    runs in plain torch.
    """
    dtype = query.dtype
    if keys.scales is None:
        query = query.to(keys.stored.dtype)
    tensors = (query, keys.stored, values.stored, options.get("mask"))
    differentiable = needs_function(*tensors)
    run = differentiable_attention if differentiable or options.get("dropout") else attention
    options |= {"key_scales": keys.scales, "value_scales": values.scales, "key_factors": keys.factors}
    out = run(query, keys.stored, values.stored, rows=keys.rows, **options)
    return out.to(dtype).contiguous()
