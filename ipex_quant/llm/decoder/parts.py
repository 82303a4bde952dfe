"""The parts of a decoder layer, which its forward and its step are both made of."""

from __future__ import annotations

from torch import nn

from .attention import CrossAttention, FusedAttention, norm_part, part
from .families import Family
from .mlp import FusedMlp, StockMlp


class LayerParts:
    """Norms, attention and MLP of `layer`, found by the names of `family`."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.norms = [norm_part(layer, name) if name else None for name in family.norms]
        self.first_norm, self.second_norm = self.norms[0], self.norms[1] if len(self.norms) > 1 else None
        self.after = self.norms[2:]
        self.attention = FusedAttention(part(layer, family.attention.module), family.attention)
        self.mlp = StockMlp(layer.mlp) if family.mlp is None else FusedMlp(part(layer, family.mlp.module), family.mlp)
        self.cross = self.cross_norm = None
        if family.cross is not None:
            self.cross = CrossAttention(part(layer, family.cross.module), family.cross)
            self.cross_norm = norm_part(layer, family.cross_norm)
