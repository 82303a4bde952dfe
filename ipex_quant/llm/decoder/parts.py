"""The parts of a decoder layer, and the orders in which layers compute them."""

from __future__ import annotations

import torch
from torch import nn

from ...ops import PostOp
from .attention import CrossAttention, FusedAttention, norm_part, part
from .call import LayerCall
from .families import Family, Residual
from .mlp import FusedMlp, StockMlp


class LayerParts:
    """Norms, attention and MLP of `layer`, found by the names of `family`."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.norms = [norm_part(layer, name) if name else None for name in family.norms]
        self.first_norm, self.second_norm = self.norms[0], self.norms[1] if len(self.norms) > 1 else None
        self.after = self.norms[2:]
        self.attention = FusedAttention(part(layer, family.attention.module), family.attention)
        mlp = family.mlp
        self.mlp = StockMlp(layer.mlp) if mlp is None else FusedMlp.named(part(layer, mlp.module), mlp)
        self.cross = self.cross_norm = None
        if family.cross is not None:
            self.cross = CrossAttention(part(layer, family.cross.module), family.cross)
            self.cross_norm = norm_part(layer, family.cross_norm)
        self.residual = family.residual
        self.order = _ORDERS[family.residual]

    def __call__(self, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Hidden states after the layer."""
        return self.order(self, x, call)

    def attends_to_encoder(self, call: LayerCall) -> bool:
        return self.cross is not None and call.encoder_states is not None


def _sequential(parts: LayerParts, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    x = parts.attention(parts.first_norm(x), call, PostOp.ADD, x)
    if parts.attends_to_encoder(call):
        x = parts.cross(parts.cross_norm(x), call, PostOp.ADD, x)
    return parts.mlp(parts.second_norm(x), PostOp.ADD, x)


def _parallel(parts: LayerParts, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    normed = parts.first_norm(x)
    attended = parts.attention(normed, call)
    return parts.mlp(parts.second_norm(x) if parts.second_norm else normed, PostOp.ADD_ADD, attended, x)


def _post_norm(parts: LayerParts, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    x = parts.first_norm(parts.attention(x, call, PostOp.ADD, x))
    if parts.attends_to_encoder(call):
        x = parts.cross_norm(parts.cross(x, call, PostOp.ADD, x))
    return parts.second_norm(parts.mlp(x, PostOp.ADD, x))


def _normed(parts: LayerParts, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    x = parts.first_norm(x)
    x = parts.second_norm(parts.attention(x, call, PostOp.ADD, x))
    return parts.mlp(x, PostOp.ADD, x)


def _sandwich(parts: LayerParts, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    after_attention, after_mlp = parts.after
    x = x + after_attention(parts.attention(parts.first_norm(x) if parts.first_norm else x, call))
    return x + after_mlp(parts.mlp(parts.second_norm(x) if parts.second_norm else x))


_ORDERS = {
    Residual.SEQUENTIAL: _sequential,
    Residual.PARALLEL: _parallel,
    Residual.POST_NORM: _post_norm,
    Residual.NORMED: _normed,
    Residual.SANDWICH: _sandwich,
}
