"""Mixtures of experts with packed weights, from directories of `ipex_quant.llm.save` and GPTQ checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ...numerics.quantized_stack import QuantizedStack
from ...ops import ExpertGate, PostOp, gate_arguments, pack_experts, run_experts
from .sources import Source
from .weights import Part, WoqWeight, rank_rows, with_columns, with_rows

_ACTIVATIONS = {
    MoEActivation.SILU: PostOp.SILU,
    MoEActivation.GELU: PostOp.GELU,
    MoEActivation.GELU_TANH: PostOp.NEW_GELU,
    MoEActivation.SILU_NO_MUL: PostOp.SILU,
    MoEActivation.GELU_NO_MUL: PostOp.GELU,
    MoEActivation.GELU_TANH_NO_MUL: PostOp.NEW_GELU,
    MoEActivation.RELU2_NO_MUL: PostOp.RELU2,
}
_CLAMPED = (MoEActivation.SWIGLUOAI, MoEActivation.SWIGLUOAI_UNINTERLEAVE)


class ReadExpertsMethod(FusedMoEMethodBase):
    """The routed experts of one layer, the module `name` of `source`.

    Raises ValueError for an activation without a kernel, and where experts are divided among ranks.
    """

    def __init__(self, moe: FusedMoEConfig, source: Source, name: str) -> None:
        super().__init__(moe)
        self.source = source
        self.name = name
        self._tensors: dict[str, torch.Tensor] = {}
        if moe.moe_parallel_config.use_ep:
            raise ValueError(f"{name}: expert parallelism is not supported, leave out --enable-expert-parallel")

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int64

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make `layer` give its tensors of the checkpoint to this method, whatever their names and shapes."""
        self._gate = _gate(layer)
        self._sizes = num_experts, hidden_size, intermediate_size_per_partition
        layer.load_weights = self._load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Read what was loaded, cut this rank's part, and pack it; nothing plain stays."""
        experts, hidden, own_width = self._sizes
        width = own_width * self.moe.tp_size
        up, down, biases, modes = self.source.experts(self.name, self._tensors, (experts, hidden, width))
        self._tensors = {}
        if self.moe.tp_size > 1:
            rank = self.moe.tp_rank
            rows = rank_rows(
                Part(self.name, (width,) * self._gate.blocks, (own_width,) * self._gate.blocks), rank, self.moe.tp_size
            )
            up = _each(up, lambda weight: with_rows(weight, rows))
            down = _each(down, lambda weight: with_columns(weight, rank * own_width, (rank + 1) * own_width))
            biases = (None if biases[0] is None else biases[0][:, rows], None if rank else biases[1])
        gate_up, down_packed = pack_experts(up, self._gate.blocks), pack_experts(down, 1)
        self._arguments = (
            *(gate_up.data, down_packed.data, *biases, gate_up.perm, down_packed.perm),
            *(experts, own_width, *map(int, modes), *gate_arguments(self._gate)),
        )

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum of the chosen experts' results; vLLM adds those of shared experts and of other ranks."""
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return run_experts(x, topk_ids, topk_weights, *self._arguments)

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        for name, tensor in weights:
            self._tensors[name] = tensor.detach()
            yield name


def _each(stack: QuantizedStack, change: Any) -> QuantizedStack:
    """The stack of `change` of every expert's weight."""
    weights = [change(WoqWeight(stack[index], None)).weight for index in range(stack.shape[0])]
    return QuantizedStack.of([replace(weight, codes=weight.codes.contiguous()) for weight in weights])


def _gate(layer: RoutedExperts) -> ExpertGate:
    activation = layer.activation
    if activation in _CLAMPED:
        offset = 1.0 if layer.swiglu_beta is None else layer.swiglu_beta
        if layer.swiglu_limit is None or layer.swiglu_alpha is None:
            raise ValueError(f"{layer.layer_name}: expected a limit and a slope of {activation.value}, got none")
        return ExpertGate(PostOp.SILU, (layer.swiglu_limit, layer.swiglu_alpha, offset))
    if activation not in _ACTIVATIONS or (activation == MoEActivation.SILU and layer.swiglu_limit is not None):
        raise ValueError(f"{layer.layer_name}: experts with the activation {activation.value} have no kernel")
    return ExpertGate(_ACTIVATIONS[activation], gated=activation.is_gated)
