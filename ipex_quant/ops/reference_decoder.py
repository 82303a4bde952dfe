"""Plain-torch definition of decoder layers with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..numerics.quantized_weight import QuantizedWeight
from .decoder import DecoderCall, DecoderStructure, DecoderWeights
from .post_op import ACTIVATIONS
from .reference import woq_linear
from .reference_attention import fused_rope_attention, paged_rope_attention
from .reference_int8 import int8_linear, quantize_activation, quantize_activation_per_token
from .reference_llm import layer_norm, rms_norm


class Int8Weight(NamedTuple):
    """A weight whose input is quantized, in the place of one that is quantized alone."""

    weight: QuantizedWeight


def decoder_layers(
    x: torch.Tensor,
    quantized: Sequence[QuantizedWeight | Int8Weight],
    weights: DecoderWeights,
    call: DecoderCall,
    structure: DecoderStructure,
) -> torch.Tensor:
    """As `ipex_quant.ops.decoder_layers`, with `quantized` instead of ``weights.packed``."""
    count, buffers = structure.projections + structure.mlp_inputs + 2, len(call.caches) // len(call.starts)
    kinds = 4 if structure.sandwich else 2
    for i, start in enumerate(call.starts):
        layer = _Layer(
            quantized[i * count :], weights.biases[i * count :], weights.static_inputs[i * count :], structure
        )
        norms = weights.norms[kinds * i :]
        biases = weights.norm_biases[kinds * i :] or [None] * kinds
        attended = layer.attention(
            layer.norm(x, norms[0], biases[0]),
            weights.head_norms[2 * i : 2 * i + 2],
            call._replace(caches=call.caches[i * buffers : (i + 1) * buffers]),
            start,
        )
        if structure.sandwich:
            attended = layer.norm(attended, norms[2], biases[2])
        hidden = x if structure.parallel else x + attended
        inner = layer.mlp(layer.norm(hidden, norms[1], biases[1]))
        if structure.sandwich:
            inner = layer.norm(inner, norms[3], biases[3])
        x = inner + attended + x if structure.parallel else inner + hidden
    return x


class _Layer:
    """The parts of one layer; each call of `linear` uses the next weight."""

    def __init__(
        self,
        weights: Sequence[QuantizedWeight | Int8Weight],
        biases: Sequence[torch.Tensor | None],
        static_inputs: Sequence[torch.Tensor | None],
        structure: DecoderStructure,
    ) -> None:
        none = [None] * len(weights)
        self.linears = iter(zip(weights, biases or none, static_inputs or none, strict=True))
        self.structure = structure

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, static_input = next(self.linears)
        if not isinstance(weight, Int8Weight):
            return woq_linear(x, weight, bias, self.structure.lowp_mode, self.structure.act_quant_mode)
        if static_input is None:
            quantized = quantize_activation_per_token(x)
        else:
            scale, zero_point, multiplier = static_input.tensor_split((1, 2))
            quantized = quantize_activation(x, multiplier, int(zero_point)), scale, zero_point.int()
        return int8_linear(*quantized, [weight.weight], bias, x.dtype)[0]

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        eps, offset = self.structure.eps, self.structure.offset
        weight = weight.float() + offset if offset else weight
        return layer_norm(x, weight, bias, eps) if self.structure.centered else rms_norm(x, weight, eps)

    def attention(self, x: torch.Tensor, norms: Sequence[torch.Tensor], call: DecoderCall, start: int) -> torch.Tensor:
        structure, cache = self.structure, call.caches
        projected = torch.cat([self.linear(x) for _ in range(structure.projections)], -1)
        if norms:
            kv_heads, dim = cache[0].shape[1], cache[0].shape[3]
            heads = projected.unflatten(-1, (-1, dim))
            query, key, value = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)
            projected = torch.cat((self.norm(query, norms[0]), self.norm(key, norms[1]), value), 2).flatten(2)
        options: dict[str, Any] = {"scale": structure.scale, "softcap": structure.softcap, "alibi": call.alibi}
        options |= {"rotary_dim": call.rotary_dim, "interleaved": structure.interleaved}
        tables, scales = (call.cos, call.sin), cache[2:4] or (None, None)
        if call.pages:
            attended = paged_rope_attention(
                projected[0], *tables, cache[0], cache[1], call.pages, scales[0], scales[1], **options
            )[None]
        else:
            factors = cache[4] if len(cache) > 4 else None
            options |= {"start": start, "mask": call.mask, "key_factors": factors}
            attended = fused_rope_attention(projected, *tables, cache[0], cache[1], scales[0], scales[1], **options)
        return self.linear(attended)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        activation = ACTIVATIONS[self.structure.activation]
        inner = [self.linear(x) for _ in range(self.structure.mlp_inputs)]
        if not self.structure.gated:
            return self.linear(activation(inner[0]))
        gates, factors = inner if len(inner) == 2 else inner[0].chunk(2, -1)
        return self.linear(activation(gates) * factors)
