"""`BEST_RECIPES`: the packaged recipe to take for a number of bits, by what was measured."""

from __future__ import annotations

from typing import NamedTuple


class BestRecipe(NamedTuple):
    """The name of a recipe, and `why` it is the one."""

    name: str
    why: str


BEST_RECIPES = {
    2: BestRecipe("w2a8-gptq-g32", "KL 0.033 on the embedded model; rounded to nearest 0.22"),
    3: BestRecipe("w3a8-gptq-g64", "KL 0.0064 on the embedded model; rounded to nearest 0.028"),
    4: BestRecipe("iq4a8-gptq-g64", "KL 0.0015 on the embedded model; AWQ 0.0045, rounded to nearest 0.0062"),
    5: BestRecipe("w5a8-gptq-g64", "KL 0.0005 on the embedded model; rounded to nearest 0.0015"),
    6: BestRecipe("w6a8-gptq-g64", "KL 0.00026 on the embedded model; rounded to nearest 0.00046"),
    8: BestRecipe("w8a16-gptq", "KL 0.00012 on the embedded model; rounded to nearest 0.00014"),
}
"""By the bits of a weight in transformer blocks; the output layer and the embeddings have 8.

Measured on 4096 tokens, in windows of 256, of text that calibration, on 16 windows of 256 tokens, did not see. Groups
were of 32 features, but those of 8 bits per channel; AWQ was `w4a8-awq-g128`.
"""
