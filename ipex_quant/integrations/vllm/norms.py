"""Norms and gated activations with native kernels, one op each; under torch.compile vLLM traces its own instead."""

from __future__ import annotations

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from ...ops import add_rms_norm, gelu_mul_halves, rms_norm, silu_mul_halves


class NativeRMSNorm(RMSNorm):
    """`RMSNorm`, but for norms of a part of the features, with or without the sum of a residual."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.variance_size_override is not None:
            return self.forward_native(x, residual)
        weight = self.weight if self.has_weight else None
        if residual is None:
            return rms_norm(x, weight, self.variance_epsilon)
        return add_rms_norm(x, residual, weight, self.variance_epsilon)


class NativeGemmaRMSNorm(GemmaRMSNorm):
    """`GemmaRMSNorm`: the weight is ``1 + weight`` and multiplies in float32."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight.float() + 1
        if residual is None:
            return rms_norm(x, weight, self.variance_epsilon)
        return add_rms_norm(x, residual, weight, self.variance_epsilon)


class NativeSiluAndMul(SiluAndMul):
    """`SiluAndMul`."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        return silu_mul_halves(x)


class NativeGeluAndMul(GeluAndMul):
    """`GeluAndMul`."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_mul_halves(x, self.approximate == "tanh")


def register() -> None:
    """Replace vLLM's layers where they are made; again without effect."""
    for original, ours in (
        (RMSNorm, NativeRMSNorm),
        (GemmaRMSNorm, NativeGemmaRMSNorm),
        (SiluAndMul, NativeSiluAndMul),
        (GeluAndMul, NativeGeluAndMul),
    ):
        if original.__name__ not in op_registry_oot:
            original.register_oot(ours)
