"""Calibration must not see the text that perplexity is measured on."""

from ipex_quant.data import calibration_text, held_out_text


def test_calibration_text_shares_no_passage_with_the_held_out_text():
    words = calibration_text().split()
    calibrated = {" ".join(words[i : i + 12]) for i in range(len(words))}
    passages = [paragraph.split() for paragraph in held_out_text().split("\n\n")]
    held_out = [" ".join(words[i : i + 12]) for words in passages for i in range(len(words) - 11)]
    assert len(held_out) > 10_000
    assert calibrated.isdisjoint(held_out)


def test_calibration_text_is_long():
    assert len(calibration_text().split()) > 50_000
