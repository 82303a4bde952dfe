"""Quantized embeddings of transformers models: asked for by type or by name, and tied to the output layer."""

import copy
import io
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import ipex_quant as ipex
from ipex_quant.nn import QuantizedEmbedding, WeightOnlyQuantizedLinear
from ipex_quant.nn.linears import weight_matrix
from ipex_quant.quantization import WoqWeightDtype, convert, get_weight_only_quant_qconfig_mapping, prepare

from .conftest import MODELS, SIZES, build, inputs_of, random_model

GEMMA = {
    **SIZES,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
BART = {
    "d_model": 64,
    "vocab_size": 96,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "scale_embedding": True,
    "max_position_embeddings": 32,
}


def gemma():
    return random_model(transformers.Gemma3ForCausalLM, GEMMA)


def mapping(**options):
    result = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8, **options)
    return result.set_object_type(nn.Embedding, result.global_qconfig)


def optimized(model, dtype=torch.float32):
    return ipex.llm.optimize(model, dtype=dtype, quantization_config=mapping())


def logits(model):
    with torch.no_grad():
        return model(**inputs_of(model)).logits


def embeddings(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedEmbedding)}


def test_nothing_but_linears_is_quantized_unasked():
    model = build("llama_tied")
    plain = get_weight_only_quant_qconfig_mapping()
    for each in (plain, plain.set_module_name("model", plain.global_qconfig)):
        assert not embeddings(ipex.llm.optimize(model, quantization_config=each))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: build("llama"), {"model.embed_tokens": None}),
        (lambda: build("llama_tied"), {"model.embed_tokens": "lm_head"}),
        (lambda: build("gpt2"), {"transformer.wte": "lm_head", "transformer.wpe": None}),
        (gemma, {"model.embed_tokens": "lm_head"}),
    ],
)
def test_what_was_tied_holds_one_weight_and_computes_what_the_float_model_does(make, expected):
    model = make()
    quantized = optimized(model)
    found = embeddings(quantized)
    assert found.keys() == expected.keys()
    for name, head in expected.items():
        assert found[name].tied == (head is not None)
        assert head is None or found[name].table is quantized.get_submodule(head)
    reference = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, (QuantizedEmbedding, WeightOnlyQuantizedLinear)):
            weight_matrix(reference.get_submodule(name)).copy_(module.weight)
    torch.testing.assert_close(logits(quantized), logits(reference), rtol=1e-3, atol=1e-3)


def test_a_seq2seq_model_with_scaled_embeddings_shares_one_table(tmp_path):
    model = random_model(transformers.BartForConditionalGeneration, BART)
    quantized = optimized(model)
    found = embeddings(quantized)
    tables = {name: module for name, module in found.items() if "position" not in name}
    assert len({id(module.table) for module in tables.values()}) == 1
    assert next(iter(tables.values())).table is quantized.lm_head
    assert {module.factor.value for name, module in tables.items() if "coder" in name} == {8.0}
    before = logits(quantized)
    assert (before.argmax(-1) == logits(model).argmax(-1)).float().mean() > 0.9
    ipex.llm.save(quantized, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert torch.equal(logits(loaded), before)
    assert len({id(module.table) for name, module in embeddings(loaded).items() if "position" not in name}) == 1


def test_small_tables_stay_in_float_unless_their_name_is_given(capsys):
    options = {**MODELS["gpt2"][1], "n_positions": 32}
    model = random_model(transformers.GPT2LMHeadModel, options)
    quantized = optimized(model)
    assert list(embeddings(quantized)) == ["transformer.wte"]
    rows = {row.module: row for row in ipex.explain(quantized).rows}
    assert rows["transformer.wte"].kernel == "lookup in the weight of lm_head"
    assert (rows["transformer.wte"].scheme, rows["transformer.wte"].nbytes) == (rows["lm_head"].scheme, 0)
    assert "leaves out small tables" in rows["transformer.wpe"].reason
    named = mapping().set_module_name("transformer.wpe", mapping().global_qconfig)
    assert len(embeddings(ipex.llm.optimize(model, quantization_config=named))) == 2


def test_other_schemes_are_not_shared():
    config = mapping().set_module_name(
        "lm_head", get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4).global_qconfig
    )
    quantized = ipex.llm.optimize(build("llama_tied"), quantization_config=config)
    assert not quantized.model.embed_tokens.tied
    assert quantized.config.quantization_config["tied"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: build("llama_tied"), gemma])
@pytest.mark.parametrize("way", ["llm", "pretrained"])
def test_saved_once_and_loaded_alike(make, dtype, way, tmp_path):
    quantized = optimized(make(), dtype)
    before = logits(quantized)
    if way == "llm":
        ipex.llm.save(quantized, tmp_path)
        loaded = ipex.llm.load(tmp_path)
    else:
        quantized.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = quantized.model.embed_tokens.tied
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.endswith("codes")}
    assert ("lm_head.codes" in names) != tied
    assert "model.embed_tokens.codes" in names
    assert torch.equal(logits(loaded), before)
    assert loaded.model.embed_tokens.tied == tied
    assert (loaded.model.embed_tokens.table is loaded.lm_head) == tied
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(ipex.llm.load(again)), before)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.embed_tokens.weight.clone(), quantized.model.embed_tokens.weight.clone())
    assert not base.embed_tokens.tied


def test_copies_and_pickles_stay_tied():
    quantized = optimized(build("llama_tied"))
    before = logits(quantized)
    torch.save(quantized, buffer := io.BytesIO())
    buffer.seek(0)
    for other in (copy.deepcopy(quantized), torch.load(buffer, weights_only=False)):
        assert other.model.embed_tokens.table is other.lm_head
        assert torch.equal(logits(other), before)
    other.load_state_dict(quantized.state_dict())
    assert other.model.embed_tokens.table is other.lm_head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tied="lm_head"), "tied: expected lists of names"),
        (lambda c: c.update(tied=[["model.embed_tokens", "other"]]), "tied: expected names of modules"),
        (lambda c: c.update(tied=[["model.embed_tokens"]]), "tied: expected embeddings"),
        (lambda c: c.update(tied=[[]]), "tied: expected embeddings"),
        (lambda c: c.update(tied=[["lm_head", "model.embed_tokens"]]), "tied: expected embeddings"),
        (lambda c: c["modules"]["lm_head"].update(group_size=32), "tied: expected modules of one scheme"),
        (lambda c: c.update(tied=[]), "codes"),
        (lambda c: c["modules"]["model.embed_tokens"].update(kind="weight_only"), "model.embed_tokens: expected"),
    ],
)
def test_a_damaged_description_of_ties_is_refused(change, message, tmp_path):
    ipex.llm.save(optimized(build("llama_tied")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        ipex.llm.load(tmp_path)


@pytest.mark.parametrize("make", [lambda: build("llama_tied"), lambda: build("gpt2"), gemma])
def test_back_to_float(make):
    model = make()
    quantized = optimized(model)
    before = logits(quantized)
    result = quantized.dequantize()
    assert not embeddings(result)
    assert [type(m) for m in result.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(logits(result), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [lambda: build("llama_tied"), gemma])
def test_new_tokens_make_both_ends_float(make):
    model = optimized(make())
    before = logits(model)
    embedding = model.get_input_embeddings()
    assert model.resize_token_embeddings(None) is embedding
    assert model.resize_token_embeddings(96) is embedding
    assert model.get_input_embeddings() is embedding
    with pytest.warns(UserWarning, match="was quantized and is a float layer now") as caught:
        result = model.resize_token_embeddings(100)
    assert len(caught) == 2
    assert result is model.get_input_embeddings()
    assert result.weight.shape == model.lm_head.weight.shape == (100, 64)
    torch.testing.assert_close(logits(model)[..., :96], before, rtol=1e-4, atol=1e-4)


def test_gradients_reach_a_soft_prompt_before_embedded_tokens():
    model = optimized(build("llama_tied"))
    tokens = inputs_of(model)["input_ids"]
    with torch.enable_grad():
        prompt = torch.randn(1, 3, 64, requires_grad=True)
        rows = model.get_input_embeddings()(tokens)
        model(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), rows], dim=1)).logits.sum().backward()
    assert prompt.grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_convert_alone_describes_it(tmp_path):
    quantized = convert(prepare(build("llama_tied"), mapping()))
    assert quantized.config.quantization_config["tied"] == [["model.embed_tokens", "lm_head"]]
    quantized.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(quantized))


def test_generation():
    model = optimized(build("llama_tied"), torch.bfloat16)
    reference = copy.deepcopy(model).dequantize()
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=4).shape == reference.generate(ids, max_new_tokens=4).shape
