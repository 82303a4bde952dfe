"""`BEST_RECIPES`: the packaged recipe to take for a number of bits, by what was measured."""

from __future__ import annotations

from typing import NamedTuple


class BestRecipe(NamedTuple):
    """The name of a recipe, and `why` it is the one."""

    name: str
    why: str


BEST_RECIPES = {
    2: BestRecipe(
        "w2a8-gptq-g32", "KL divergence 0.028 on the embedded model, where rounding to nearest has 0.22 and more bytes"
    ),
    3: BestRecipe(
        "w3a8-gptq-g64",
        "KL divergence 0.0054 on the embedded model, where rounding to nearest has 0.028 and more bytes",
    ),
    4: BestRecipe(
        "w4a8-gptq-g128", "KL divergence 0.0013 on the embedded model, where AWQ has 0.0037, and 0.049 on SmolLM2-135M"
    ),
    5: BestRecipe(
        "w5a8-gptq-g64",
        "KL divergence 0.0005 on the embedded model, where rounding to nearest has 0.0017 and more bytes",
    ),
    6: BestRecipe("w6a8-gptq-g64", "TODO KL"),
    8: BestRecipe("w8a16", "TODO KL"),
}
"""By the bits of a weight in transformer blocks; the output layer and the embeddings have 8.

Measured on 4096 tokens of text that no calibration saw, with 16 windows of 256 tokens to calibrate.
"""
