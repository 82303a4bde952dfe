"""Which optimizers have a `Rule`, by their exact class: a subclass may compute otherwise."""

from __future__ import annotations

from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from .layerwise import Lamb, Lars
from .rules import AdagradRule, AdamRule, Rule, SGDRule

RULES: dict[type[Optimizer], Rule] = {
    SGD: SGDRule(),
    Adam: AdamRule(),
    AdamW: AdamRule(),
    Adagrad: AdagradRule(),
    Lamb: Lamb.rule,
    Lars: Lars.rule,
}
"""How optimizers with fused updates, also of split master weights, do them."""
