import itertools
import math
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant import evaluation

VOCABULARY = 11


class DigitTokenizer:
    """Maps "3 1 4" to [3, 1, 4], between special tokens where these are asked for."""

    def __init__(self, first=(), last=()):
        self.first, self.last = list(first), list(last)

    def __call__(self, text, return_tensors=None, add_special_tokens=True, **options):
        ids = [int(word) for word in text.split()]
        if add_special_tokens:
            ids = [*self.first, *ids, *self.last]
        return {"input_ids": torch.tensor([ids], dtype=torch.int64) if return_tensors else ids}


class BigramModel(nn.Module):
    """Logits of the next token are a row of a table, whatever came before."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.lengths = []

    def forward(self, input_ids):
        self.lengths.append(input_ids.shape[1])
        return types.SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def tokenizer():
    return DigitTokenizer()


def random_model(seed=0):
    return BigramModel(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def random_text(length, seed=0):
    ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(map(str, ids.tolist()))


def bigram_probabilities(model):
    exponentials = model.table.detach().double().exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)).tolist()


@pytest.mark.parametrize("sequence_length", [1, 3, 19, 20, 64, 1000])
@pytest.mark.parametrize("length", [2, 21, 300])
def test_perplexity_predicts_every_token_once(tokenizer, sequence_length, length):
    model, text = random_model(), random_text(length)
    ids, probabilities = [int(word) for word in text.split()], bigram_probabilities(model)
    expected = math.exp(-sum(math.log(probabilities[a][b]) for a, b in itertools.pairwise(ids)) / (length - 1))

    assert evaluation.perplexity(model, tokenizer, text, sequence_length) == pytest.approx(expected, rel=1e-5)
    assert sum(model.lengths) == length - 1
    assert max(model.lengths) <= sequence_length


@pytest.mark.parametrize("last", [(), (10,)])
@pytest.mark.parametrize("first", [(), (9,), (9, 8)])
def test_first_tokens_are_those_before_a_text(first, last):
    assert evaluation.first_tokens(DigitTokenizer(first, last)) == list(first)


def test_models_see_the_first_tokens_before_each_window():
    torch.manual_seed(0)
    options = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**options, num_attention_heads=2, num_key_value_heads=2)).eval()
    ids = torch.tensor([3, 1, 4, 1, 5])
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([[9, *part]])).logits[0, 1:] for part in ([3, 1, 4], [1])]
    loss = nn.functional.cross_entropy(torch.cat(logits), ids[1:])
    tokenizer, text = DigitTokenizer([9]), "3 1 4 1 5"
    assert evaluation.perplexity(model, tokenizer, text, 3) == pytest.approx(loss.exp().item(), rel=1e-5)
    result = evaluation.compare(model, model, tokenizer, text, 3)
    assert (result.perplexity, result.tokens) == (pytest.approx(loss.exp().item(), rel=1e-5), 4)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer):
    model = BigramModel(torch.zeros(VOCABULARY, VOCABULARY))
    assert evaluation.perplexity(model, tokenizer, random_text(50), 16) == pytest.approx(VOCABULARY, rel=1e-6)


def test_max_tokens_limits_the_predicted_tokens(tokenizer):
    model, text = random_model(), random_text(50)
    shorter = " ".join(text.split()[:8])
    assert evaluation.perplexity(model, tokenizer, text, 4, max_tokens=7) == evaluation.perplexity(
        model, tokenizer, shorter, 4
    )


def test_compare_equals_the_definitions(tokenizer):
    reference, model, text = random_model(0), random_model(1), random_text(301)
    p, q = bigram_probabilities(reference), bigram_probabilities(model)
    seen = [int(word) for word in text.split()][:-1]
    divergences = sorted(sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True)) for i in seen)
    agreement = sum(p[i].index(max(p[i])) == q[i].index(max(q[i])) for i in seen) / len(seen)

    result = evaluation.compare(reference, model, tokenizer, text, sequence_length=64)

    assert result.kl_divergence == pytest.approx(sum(divergences) / len(seen), rel=1e-5)
    assert result.kl_99th_percentile == pytest.approx(0.99 * divergences[296] + 0.01 * divergences[297])
    assert result.kl_largest == pytest.approx(divergences[-1], rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreement)
    assert 0 < agreement < 1
    assert result.tokens == 300
    assert result.reference_perplexity == pytest.approx(evaluation.perplexity(reference, tokenizer, text), rel=1e-6)
    assert result.perplexity == pytest.approx(evaluation.perplexity(model, tokenizer, text), rel=1e-6)


def test_compare_with_itself_is_perfect(tokenizer):
    model = random_model()
    result = evaluation.compare(model, model, tokenizer, random_text(40))
    assert (result.kl_divergence, result.top1_agreement) == (0.0, 1.0)
    assert result.perplexity == result.reference_perplexity


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["reference", "model"])
def test_logits_that_are_not_finite_are_refused_with_their_place(tokenizer, broken, value):
    models = {"reference": random_model(0), "model": random_model(1)}
    models[broken].table.data[7, 3] = value
    with pytest.raises(ValueError, match=f"{broken}: expected finite logits, .* at token 2 of a window of 4"):
        evaluation.compare(*models.values(), tokenizer, "1 2 7 3 4", 64)
    with pytest.raises(ValueError, match="model: expected finite logits"):
        evaluation.perplexity(models[broken], tokenizer, "1 2 7 3 4")


@pytest.mark.parametrize("logit", [-math.inf, -1e5])
def test_a_loss_without_a_perplexity_is_refused(tokenizer, logit):
    model = random_model()
    model.table.data[2, 3] = logit
    with pytest.raises(ValueError, match="model: perplexity: expected a finite number, got inf"):
        evaluation.perplexity(model, tokenizer, "1 2 3")


def test_a_divergence_that_is_infinite_is_refused(tokenizer):
    model = random_model()
    model.table.data[2, 5] = -math.inf
    with pytest.raises(ValueError, match="model: KL divergence: expected a finite number, got inf"):
        evaluation.compare(random_model(), model, tokenizer, "1 2 3")


@pytest.mark.parametrize("broken", ["reference", "model"])
def test_outputs_that_are_not_finite_are_refused(broken):
    models = {"reference": nn.Linear(2, 2), "model": nn.Linear(2, 2)}
    models[broken].bias.data[1] = math.nan
    call = {"input": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=f"{broken}: expected finite outputs, got NaN or infinity in call 0"):
        evaluation.compare_outputs(*models.values(), [(call, call)])


def test_compare_refuses_another_vocabulary(tokenizer):
    other = BigramModel(torch.zeros(VOCABULARY, VOCABULARY + 1))
    with pytest.raises(ValueError, match="vocabulary of 11 tokens, got 12"):
        evaluation.compare(random_model(), other, tokenizer, random_text(9))


@pytest.mark.parametrize("text", ["", "7"])
def test_a_text_without_a_prediction_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluation.perplexity(random_model(), tokenizer, text)


def test_sequence_length_must_be_positive(tokenizer):
    with pytest.raises(ValueError, match="sequence_length: expected at least 1, got 0"):
        evaluation.perplexity(random_model(), tokenizer, "1 2 3", 0)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_kept(tokenizer, training):
    model = random_model().train(training)
    model.frozen = torch.nn.Dropout().eval()
    evaluation.perplexity(model, tokenizer, "1 2 3")
    assert model.training is training
    assert not model.frozen.training


def test_decode_speed_times_the_tokens_after_the_first(tokenizer, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(now) * 0.25)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    assert evaluation.decode_speed(model, tokenizer, "1 2 3 4 5", new_tokens=6, repeats=1) == pytest.approx(4.0)


def test_decode_speed_needs_two_tokens(tokenizer):
    with pytest.raises(ValueError, match="new_tokens: expected at least 2, got 1"):
        evaluation.decode_speed(random_model(), tokenizer, "1", new_tokens=1)


def test_model_bytes_counts_shared_memory_once():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model.register_buffer("packed", torch.zeros(100, dtype=torch.uint8), persistent=False)
    model.register_buffer("view", model.packed[10:20])
    weights, batch_norm = (4 * 3 + 3) * 4, 4 * 3 * 4 + 8
    assert evaluation.model_bytes(model) == weights + batch_norm + 100


def test_model_bytes_asks_the_modules_that_know():
    class Packed(nn.Module):
        nbytes = 7

        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(100))

    assert evaluation.model_bytes(nn.Sequential(Packed(), Packed(), nn.Linear(4, 3))) == 7 + 7 + 15 * 4
