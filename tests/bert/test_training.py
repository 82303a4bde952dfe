import copy
import pickle

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.nn import prepacked

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def with_labels(batch):
    """`batch` with a label for each token that is not hidden."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def relative_errors(found, expected):
    assert found.keys() == expected.keys()
    return {name: float((found[name] - g).norm() / g.norm().clamp(min=1e-6)) for name, g in expected.items()}


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("mask", ["2-D", "3-D", "none"])
def test_gradients(small_model, mask, unpad, batch):
    model = small_model("BertForMaskedLM", **NO_DROPOUT).train()
    fast = ipex.fast_bert(model, unpad=unpad)
    batch, stock = with_labels(batch), with_labels(batch)
    if mask == "3-D":
        batch["attention_mask"] = torch.rand(4, 9, 9).round().long() | torch.eye(9, dtype=torch.long)
        stock["attention_mask"] = batch["attention_mask"].bool()[:, None]
    if mask == "none":
        batch["attention_mask"] = stock["attention_mask"] = None
    errors = relative_errors(gradients(fast, batch), gradients(model, stock))
    # a bias of keys shifts all scores of a query: its gradient is zero but for rounding
    assert max(error for name, error in errors.items() if "key.bias" not in name) < 1e-5, errors


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16(small_model, autocast, batch):
    model = small_model("BertForMaskedLM", **NO_DROPOUT).bfloat16().train()
    fast = ipex.fast_bert(model, dtype=torch.bfloat16, unpad=True)
    batch = with_labels(batch)
    expected = gradients(copy.deepcopy(model).float(), batch)
    stock = relative_errors(gradients(model, batch), expected)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = relative_errors(gradients(fast, batch), expected)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in fast.parameters())
    for name in found:
        if "key.bias" not in name:
            assert found[name] < max(1.5 * stock[name], 0.02), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(small_model, dtype, seed, reentrant, batch):
    """Layers that are computed again drop what they had dropped."""
    batch = with_labels(batch)
    found = []
    for checkpointing in (False, True):
        fast = ipex.fast_bert(small_model("BertForMaskedLM"), dtype=dtype, unpad=True, seed=seed).train()
        if checkpointing:
            fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        found.append(gradients(fast, batch))
    torch.testing.assert_close(found[1], found[0])


def test_dropout_is_reproducible(small_model, batch):
    model = small_model().train()
    fast = ipex.fast_bert(model, unpad=True)
    torch.manual_seed(3)
    first, second = fast(**batch)[0], fast(**batch)[0]
    torch.manual_seed(3)
    assert torch.equal(fast(**batch)[0], first)
    assert not torch.equal(second, first)
    seeded = [ipex.fast_bert(model, unpad=True, seed=seed) for seed in (3, 3, 4)]
    before = torch.get_rng_state()
    first, same, other = (each(**batch)[0] for each in seeded)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(same, first)
    assert not torch.equal(other, first)
    assert not torch.equal(seeded[0](**batch)[0], first)


def test_dropout_rates(small_model, batch):
    fast = ipex.fast_bert(small_model(hidden_dropout_prob=0.25, num_hidden_layers=1), unpad=True).train()
    shares = []
    for module in (fast.embeddings.dropout, fast.encoder.layer[0].output.dropout):
        module.register_forward_hook(lambda module, args, y: shares.append((y == 0).float().mean().item()))
    for _ in range(20):
        fast(**batch)
    assert len(shares) == 40
    assert sum(shares) / 40 == pytest.approx(0.25, abs=0.02)


def labels_of(kind, batch):
    """`batch` with labels for a model of class `kind`."""
    labelled, sequences = with_labels(batch), torch.tensor([0, 1, 1, 0])
    tokens = labelled.pop("labels")
    return labelled | {
        "BertForMaskedLM": {"labels": tokens},
        "BertForPreTraining": {"labels": tokens, "next_sentence_label": sequences},
        "BertForTokenClassification": {"labels": torch.where(tokens < 0, tokens, tokens % 2)},
        "BertForSequenceClassification": {"labels": sequences},
        "BertForQuestionAnswering": {"start_positions": sequences, "end_positions": sequences + 1},
    }.get(kind, {"labels": sequences})


@pytest.mark.parametrize(
    "kind",
    [
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForTokenClassification",
        "BertForSequenceClassification",
        "BertForQuestionAnswering",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplies", [False, True])
def test_heads(small_model, multiplies, dtype, kind, batch, monkeypatch):
    """Gradients with an optimizer, in bfloat16 without autocast, on CPUs that multiply it and on others."""
    monkeypatch.setattr(prepacked, "_SLOW", frozenset() if multiplies else frozenset((torch.bfloat16,)))
    batch["attention_mask"][:, 0] = 1  # where poolers look
    batch = labels_of(kind, batch)
    model = small_model(kind, **NO_DROPOUT).train()
    fast, _ = ipex.fast_bert(model, dtype=dtype, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    expected = gradients(model, batch)
    errors = relative_errors(gradients(fast, batch), expected)
    largest = max(float(g.norm()) for g in expected.values())
    for name, error in errors.items():
        if float(expected[name].norm()) > 1e-3 * largest:
            assert error < (1e-4 if dtype == torch.float32 else 0.1), (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_steps(small_model, autocast, dtype, batch):
    """Losses of a few steps are those of stock code, which computes in bfloat16 under autocast alone."""
    batch = with_labels(batch)
    model = small_model("BertForMaskedLM", **NO_DROPOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fast, fast_optimizer = ipex.fast_bert(model, dtype=dtype, optimizer=optimizer, unpad=True)
    losses = []
    for each, steps in ((model, optimizer), (fast, fast_optimizer)):
        losses.append([])
        for _ in range(5):
            steps.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32 and (autocast or each is model)):
                loss = each(**batch).loss
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype == torch.float32 else 0.03)
    assert fast.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(fast.state_dict())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert model(**batch).loss.item() == pytest.approx(fast(**batch).loss.item(), rel=0.02)


def test_an_optimizer_without_fused_update_is_named_where_it_was_given(small_model):
    model = small_model().train()
    with pytest.warns(UserWarning, match="RMSprop") as caught:
        ipex.fast_bert(model, torch.bfloat16, torch.optim.RMSprop(model.parameters()))
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_trains_on(small_model, copied, batch):
    batch = with_labels(batch)
    model = small_model("BertForMaskedLM", **NO_DROPOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pairs = [ipex.fast_bert(model, dtype=torch.bfloat16, optimizer=optimizer, unpad=True)]
    for number in range(2):
        for fast, steps in pairs:
            steps.zero_grad()
            fast(**batch).loss.backward()
            steps.step()
        if number == 0:
            pairs.append(copied(pairs[0]))
    torch.testing.assert_close(pairs[0][0].state_dict(), pairs[1][0].state_dict(), rtol=0, atol=0)
