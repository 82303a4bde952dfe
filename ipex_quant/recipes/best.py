"""`BEST_RECIPES`: the packaged recipe to take for a number of bits, by what was measured."""

from __future__ import annotations

from typing import NamedTuple


class BestRecipe(NamedTuple):
    """The name of a recipe, and `why` it is the one."""

    name: str
    why: str


BEST_RECIPES = {
    2: BestRecipe("w2a8-gptq-g32", "KL 0.028 on the embedded model; rounded to nearest 0.22"),
    3: BestRecipe("w3a8-gptq-g64", "KL 0.0054 on the embedded model; rounded to nearest 0.028"),
    4: BestRecipe("w4a8-gptq-g128", "KL 0.0013 on the embedded model; AWQ 0.0037, rounded to nearest 0.010"),
    5: BestRecipe("w5a8-gptq-g64", "KL 0.0005 on the embedded model; rounded to nearest 0.0017"),
    6: BestRecipe("w6a8-gptq-g64", "KL 0.00027 on the embedded model; rounded to nearest 0.00057"),
    8: BestRecipe("w8a16-gptq", "KL 0.00011 on the embedded model; rounded to nearest (w8a16) 0.00013"),
}
"""By the bits of a weight in transformer blocks; the output layer and the embeddings have 8.

Measured on 4096 tokens of text that calibration, on 16 windows of 256 tokens, did not see. Groups were of 32 features,
of weights of 5 and 6 bits 64, and those of 8 bits per channel.
"""
