import copy
import pickle

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.nn.prepacked import restore_prepacked

HEADS = {
    "BertModel": "last_hidden_state",
    "BertForPreTraining": "prediction_logits",
    "BertForMaskedLM": "logits",
    "BertForTokenClassification": "logits",
    "BertForQuestionAnswering": "start_logits",
    "BertForSequenceClassification": "logits",
    "BertForNextSentencePrediction": "logits",
}
PER_TOKEN = ("last_hidden_state", "prediction_logits", "start_logits")


@torch.inference_mode()
def outputs_of(model, *args, **kwargs):
    return model(*args, **kwargs)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("unpad", [False, True])
def test_heads(small_model, kind, unpad, batch):
    model = small_model(kind)
    fast = ipex.fast_bert(model, unpad=unpad)
    batch["attention_mask"][:, 0] = 1  # where poolers look
    expected, found = outputs_of(model, **batch), outputs_of(fast, **batch)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    real = batch["attention_mask"].bool()
    for name, value in found.items():
        other = expected[name]
        if unpad and value.dim() >= 2 and value.shape[:2] == real.shape:
            value, other = value[real], other[real]
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unpad", [False, True])
def test_bfloat16(small_model, unpad, batch):
    model = small_model()
    fast = ipex.fast_bert(model, dtype=torch.bfloat16, unpad=unpad)
    found = outputs_of(fast, **batch)[0]
    assert found.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    expected = outputs_of(copy.deepcopy(model).bfloat16().float(), **batch)[0]
    stock = outputs_of(copy.deepcopy(model).bfloat16(), **batch)[0]
    real = batch["attention_mask"].bool()
    error = (found.float() - expected)[real].abs().mean()
    assert error < 1.2 * (stock.float() - expected)[real].abs().mean()


def test_hidden_tokens_are_zero_when_unpadded(small_model, batch):
    fast = ipex.fast_bert(small_model(), unpad=True)
    hidden = ~batch["attention_mask"].bool()
    batch["attention_mask"][1] = 0  # a sequence without any token
    outputs = outputs_of(fast, **batch, output_hidden_states=True)
    for states in outputs.hidden_states:
        assert states.shape == (4, 9, 32)
        assert (states[hidden] == 0).all()
        assert (states[1] == 0).all()
        assert (states[~hidden & batch["attention_mask"].bool()] != 0).all()


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("kind", ["none", "ones", "bool", "float", "3-D", "4-D bool", "4-D added"])
def test_masks(small_model, kind, unpad, batch):
    model = small_model()
    fast = ipex.fast_bert(model, unpad=unpad)
    real = batch.pop("attention_mask")
    pairs = torch.rand(4, 9, 9) > 0.4
    pairs |= torch.eye(9, dtype=torch.bool)
    added = torch.zeros(4, 1, 9, 9).masked_fill(~pairs[:, None], torch.finfo(torch.float32).min)
    given, stock = {
        "none": (None, None),
        "ones": (torch.ones_like(real), None),
        "bool": (real.bool(), real),
        "float": (real.float(), real),
        "3-D": (pairs.long(), pairs[:, None]),
        "4-D bool": (pairs[:, None], pairs[:, None]),
        "4-D added": (added, added),
    }[kind]
    expected, found = (outputs_of(m, **batch, attention_mask=mask)[0] for m, mask in ((model, stock), (fast, given)))
    seen = real.bool() if unpad and kind in ("bool", "float") else torch.ones_like(real, dtype=torch.bool)
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unpad", [False, True])
def test_inputs(small_model, unpad, batch):
    model = small_model()
    fast = ipex.fast_bert(model, unpad=unpad)
    ids, mask, types = batch.values()
    positions = torch.randint(16, (4, 9))
    embeds = torch.randn(4, 9, 32)
    for args, kwargs in [
        ((ids, mask), {}),
        ((ids, mask, types, positions), {}),
        ((ids,), {"attention_mask": mask, "position_ids": positions[:1]}),
        ((), {"attention_mask": mask, "inputs_embeds": embeds, "position_ids": positions}),
    ]:
        expected, found = outputs_of(model, *args, **kwargs)[0], outputs_of(fast, *args, **kwargs)[0]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_hidden_states_and_tuples(small_model, batch):
    model = small_model()
    fast = ipex.fast_bert(model)
    expected = outputs_of(model, **batch, output_hidden_states=True)
    found = outputs_of(fast, **batch, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    assert found.hidden_states[-1] is found.last_hidden_state
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-5)
    as_tuple = outputs_of(fast, **batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple, outputs_of(model, **batch, return_dict=False), rtol=1e-4, atol=1e-5)


def test_attentions_come_from_stock_code(small_model, batch):
    model = small_model(attn_implementation="eager")
    fast = ipex.fast_bert(model, unpad=True)
    with pytest.warns(UserWarning, match="output_attentions"):
        found = outputs_of(fast, **batch, output_attentions=True)
    expected = outputs_of(model, **batch, output_attentions=True)
    torch.testing.assert_close(found.attentions, expected.attentions)
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("option", ["gelu_new", "relu", "silu", "tanh", "quick_gelu"])
def test_activations(small_model, option, batch):
    model = small_model(hidden_act=option)
    torch.testing.assert_close(
        outputs_of(ipex.fast_bert(model), **batch)[0], outputs_of(model, **batch)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [3, 100])
def test_chunks_of_the_feed_forward(small_model, chunk, batch):
    model = small_model()
    expected = outputs_of(model, **batch)[0]
    model = small_model(chunk_size_feed_forward=chunk)
    torch.testing.assert_close(outputs_of(ipex.fast_bert(model), **batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_what_is_not_called_run_stock_code(small_model, batch):
    model = small_model()
    fast = ipex.fast_bert(model, unpad=True)
    calls = []
    handle = fast.encoder.layer[1].attention.register_forward_hook(lambda *_: calls.append("attention"))
    torch.testing.assert_close(outputs_of(fast, **batch)[0], outputs_of(model, **batch)[0])
    assert calls == ["attention"]
    handle.remove()
    fast.encoder.layer[1].attention.self.query.register_forward_hook(lambda *_: calls.append("query"))
    assert (outputs_of(fast, **batch)[0][~batch["attention_mask"].bool()] == 0).all()
    assert calls == ["attention", "query"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(small_model, copied, batch):
    fast = ipex.fast_bert(small_model("BertForMaskedLM"), dtype=torch.bfloat16, unpad=True, seed=3)
    expected = outputs_of(fast, **batch).logits
    other = copied(fast)
    torch.testing.assert_close(outputs_of(other, **batch).logits, expected, rtol=0, atol=0)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.zero_()
    assert not torch.equal(outputs_of(other, **batch).logits, expected)
    assert torch.equal(outputs_of(fast, **batch).logits, expected)


def test_saving(small_model, tmp_path, batch):
    model = small_model("BertForMaskedLM")
    fast = ipex.fast_bert(model, unpad=True)
    assert fast.state_dict().keys() == model.state_dict().keys()
    fast.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs_of(loaded, **batch).logits, outputs_of(model, **batch).logits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    fast.load_state_dict(model.state_dict())
    real = batch["attention_mask"].bool()
    found, expected = (outputs_of(each, **batch).logits[real] for each in (fast, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_float64_is_stock(small_model, batch):
    model = small_model().double()
    fast = ipex.fast_bert(small_model(), unpad=True).double()
    torch.testing.assert_close(outputs_of(fast, **batch)[0], outputs_of(model, **batch)[0])


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_batches_without_a_token(small_model, unpad, grad):
    fast = ipex.fast_bert(small_model("BertForMaskedLM"), unpad=unpad)
    for shape in ((0, 9), (3, 0), (0, 0)):
        ids = torch.zeros(shape, dtype=torch.long)
        for mask in (None, torch.ones_like(ids)):
            with torch.set_grad_enabled(grad):
                assert fast(ids, attention_mask=mask).logits.shape == (*shape, 99)
    hidden = torch.zeros(3, 9, dtype=torch.long)
    with torch.set_grad_enabled(grad):
        logits = fast(hidden, attention_mask=hidden).logits
    assert logits.isfinite().all()
    if grad:
        logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)


@pytest.mark.parametrize("embeds", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_in_another_dtype(small_model, packed, dtype, autocast, embeds):
    """The model's dtype is that of its computation."""
    model = small_model()
    fast = ipex.fast_bert(model, dtype=dtype)
    if not packed:
        restore_prepacked(fast)
    given = torch.randn(4, 9, 32).to(embeds)
    expected = outputs_of(model, inputs_embeds=given.float())[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outputs_of(fast, inputs_embeds=given)[0]
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("unpad", [False, True])
def test_compiled(small_model, unpad, grad, batch):
    fast = ipex.fast_bert(small_model(), unpad=unpad)
    with torch.set_grad_enabled(grad):
        expected = fast(**batch)[0]
        found = torch.compile(fast, backend="aot_eager", fullgraph=True)(**batch)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_traced(small_model, batch):
    fast = ipex.fast_bert(small_model(return_dict=False), unpad=True)
    ids, mask, types = batch.values()
    traced = torch.jit.trace(fast, (ids, mask, types), check_trace=False)
    for rows in (slice(0, 4), slice(1, 3)):
        args = ids[rows], mask[rows], types[rows]
        torch.testing.assert_close(traced(*args)[0], fast(*args)[0])
