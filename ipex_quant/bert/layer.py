"""A layer of BERT on the rows of ragged tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import ops
from ..nn.fused_forward import FusedForward
from ..ops.gradient import needs_gradient
from .attention import attend
from .tokens import Tokens


class FastLayer(FusedForward):
    """Replaces the `forward` of a ``BertLayer``; takes the `Tokens` of a batch in the place of the attention mask.

    Linear layers, activations and dropout modules are called as modules; attention and norms are not. With another
    attention mask it is the layer's own `forward`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if not isinstance(attention_mask, Tokens):
            return type(layer).forward(layer, hidden_states, attention_mask, *args, **kwargs)
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(self.run, hidden_states, attention_mask)
        return self.run(hidden_states, attention_mask)

    def run(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The layer's result ``[T, K]`` for the rows `x` ``[T, K]`` of `tokens`."""
        attention = self.layer.attention
        x = add_norm(attention.output, self_attention(attention.self, x, tokens), x)
        chunk = self.layer.chunk_size_feed_forward * tokens.batch
        if chunk == 0:
            return self._feed_forward(x)
        return torch.cat([self._feed_forward(rows) for rows in x.split(chunk)])

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        intermediate = self.layer.intermediate
        return add_norm(self.layer.output, intermediate.intermediate_act_fn(intermediate.dense(x)), x)


def self_attention(module: nn.Module, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """What a ``BertSelfAttention`` computes of rows `x` ``[T, K]``."""
    heads = (module.num_attention_heads, module.attention_head_size)
    states = [linear(x).unflatten(-1, heads) for linear in (module.query, module.key, module.value)]
    dropout = module.dropout.p if module.training else 0.0
    return attend((*states,), tokens, module.scaling, dropout).flatten(1)


def add_norm(module: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """What a ``BertSelfOutput`` or ``BertOutput`` computes: ``LayerNorm(dropout(dense(x)) + residual)``."""
    return norm_of_sum(module.LayerNorm, module.dropout(module.dense(x)), residual)


def norm_of_sum(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``norm(x + residual)``."""
    if needs_gradient(x, residual, norm.weight, norm.bias) or x.dtype != residual.dtype:
        return norm(x + residual)
    return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)[0]


def uncalled_modules(bert: nn.Module) -> Iterator[nn.Module]:
    """The modules within the embeddings and the encoder of a ``BertModel`` whose hooks do not run."""
    yield from (bert.embeddings, bert.embeddings.LayerNorm, bert.encoder)
    for layer in bert.encoder.layer:
        yield from (layer.attention, layer.attention.self, layer.intermediate)
        for output in (layer.attention.output, layer.output):
            yield from (output, output.LayerNorm)
