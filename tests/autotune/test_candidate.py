import json

import pytest

from ipex_quant.autotune.candidate import Int8Candidate, WeightOnlyCandidate
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Int8Candidate("auto", 100), "INT8 SmoothQuant alpha auto, 100 samples"),
        (Int8Candidate(0.5, 8, ("a", "b")), "INT8 SmoothQuant alpha 0.5, 8 samples, 2 in float"),
        (Int8Candidate(None, 8), "INT8 static, 8 samples"),
        (
            WeightOnlyCandidate(
                "gptq", WoqLowpMode.BF16, (("a", WeightScheme(WoqWeightDtype.INT4, False, 64)), ("b", None))
            ),
            "GPTQ int4 asym g64, 1 in float, computed in BF16",
        ),
    ],
)
def test_recipes_are_the_same_after_json(recipe, text):
    values = json.loads(json.dumps(recipe.to_json()))
    assert type(recipe).from_json(values) == recipe
    assert str(recipe) == text
