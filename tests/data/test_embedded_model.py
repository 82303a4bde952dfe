"""The embedded model loads offline, is as small as promised, and predicts text it has never seen."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_quant.data import calibration_text, embedded_model_dir, held_out_text


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model_dir(), local_files_only=True, dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_dir(), local_files_only=True)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return tokenizer(held_out_text(), return_tensors="pt")["input_ids"][0]


def test_files_are_small():
    assert sum(file.stat().st_size for file in embedded_model_dir().iterdir()) < 12e6


def test_architecture(model):
    config = model.config
    assert config.model_type == "llama"
    assert 5e6 <= model.num_parameters() <= 6e6
    assert config.num_key_value_heads < config.num_attention_heads
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.in_features % 128 == 0 for linear in linears)


def test_tokenizer_round_trips_any_text(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size == 4096
    for text in (held_out_text(), " indented\n\ttext,  ünïcödé, 漢字 and \U0001f40d"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_held_out_text_suffices_for_a_stable_perplexity(tokens):
    assert len(tokens) >= 20_000


def test_calibration_text_shares_no_long_line_with_the_held_out_text():
    calibration_lines, held_out_lines = (
        {line.strip() for line in text.splitlines() if len(line.split()) >= 12}
        for text in (calibration_text(), held_out_text())
    )
    assert min(len(calibration_lines), len(held_out_lines)) > 100
    assert calibration_lines.isdisjoint(held_out_lines)


def test_held_out_perplexity_is_a_sixth_of_a_unigram_models(model, tokens):
    context = model.config.max_position_embeddings
    windows = tokens[: len(tokens) // context * context].view(-1, context)[::4]
    unigram_log_shares = (tokens.bincount(minlength=4096) / len(tokens)).log()
    unigram_loss = -unigram_log_shares[windows[:, 1:]].mean()
    with torch.inference_mode():
        losses = [cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]) for window in windows]
    assert torch.stack(losses).mean().exp() <= unigram_loss.exp() / 6


def test_greedy_generation_is_finite_text(model, tokenizer):
    prompt = tokenizer("Return a new list containing", return_tensors="pt")
    result = model.generate(
        **prompt, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.stack(result.logits).isfinite().all()
    text = tokenizer.decode(result.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(text.split()) >= 5
