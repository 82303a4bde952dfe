import pytest
import torch

from ipex_quant.recipes.apply import apply_recipe, calibration_windows
from ipex_quant.recipes.recipe import load_recipe


class CountingTokenizer:
    """A token for every word, numbered."""

    def __call__(self, text, **options):
        return {"input_ids": torch.arange(len(text.split()))[None]}


@pytest.mark.parametrize(
    ("words", "samples", "starts"), [(100, 4, [0, 30, 60, 90]), (39, 9, [0, 10, 20]), (10, 1, [0]), (25, 1, [0])]
)
def test_calibration_windows_spread_over_the_text(words, samples, starts):
    windows = calibration_windows(CountingTokenizer(), "word " * words, samples, sequence_length=10)
    assert [window.tolist() for window in windows] == [[list(range(start, start + 10))] for start in starts]


def test_a_short_calibration_text_is_refused():
    with pytest.raises(ValueError, match="calibration text: expected at least 10 tokens, got 9"):
        calibration_windows(CountingTokenizer(), "word " * 9, 4, sequence_length=10)


def test_gptq_without_calibration_is_refused():
    with pytest.raises(ValueError, match="recipe w4a8-gptq-g128: GPTQ needs calibration text, got none"):
        apply_recipe(load_recipe("w4a8-gptq-g128"), torch.nn.Linear(8, 8))
