"""Saved models under other classes of their architecture, and what stands in for layers while transformers loads."""

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.quantization import (
    WoqWeightDtype,
    convert,
    default_static_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

MAPPING = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8, group_size=32)


def int8(model, inputs):
    prepared = prepare(model, default_static_qconfig_mapping, example_kwarg_inputs=inputs)
    prepared(**inputs)
    return convert(prepared)


@pytest.fixture(params=["weight-only", "static INT8"])
def quantized(request, make_model, tokens):
    model = make_model("llama_tied")
    if request.param == "static INT8":
        return int8(model, tokens(model))
    return ipex.llm.optimize(model, quantization_config=MAPPING, inplace=True)


def hidden(model, tokens):
    return model(**tokens(model)).last_hidden_state


def kinds(model):
    return {
        name: type(m).__name__
        for name, m in model.named_modules()
        if isinstance(m, (WeightOnlyQuantizedLinear, Int8Linear))
    }


def test_a_model_with_a_head_loads_without_it(quantized, tokens, tmp_path):
    ipex.llm.save(quantized, tmp_path / "model")
    base = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert type(base) is transformers.LlamaModel
    assert torch.equal(hidden(base, tokens), hidden(quantized.model, tokens))
    assert kinds(base) == kinds(quantized.model)
    groups = base.config.quantization_config["share_groups"]
    assert groups == [
        [name.removeprefix("model.") for name in group]
        for group in quantized.config.quantization_config["share_groups"]
    ]


def test_a_new_head_stays_in_float(quantized, tokens, tmp_path):
    ipex.llm.save(quantized, tmp_path / "model")
    model_class = transformers.AutoModelForSequenceClassification
    classifier = model_class.from_pretrained(tmp_path / "model", num_labels=3)
    assert torch.equal(hidden(classifier.model, tokens), hidden(quantized.model, tokens))
    assert type(classifier.score) is torch.nn.Linear
    assert kinds(classifier.model) == kinds(quantized.model)
    classifier.score.weight.data.normal_()
    ipex.llm.save(classifier, tmp_path / "classifier")
    again = ipex.llm.load(tmp_path / "classifier")
    assert type(again) is transformers.LlamaForSequenceClassification
    assert torch.equal(again(**tokens(again)).logits, classifier(**tokens(classifier)).logits)


def test_a_base_model_gets_its_head_back(quantized, tokens, tmp_path):
    ipex.llm.save(quantized, tmp_path / "model")
    base = transformers.AutoModel.from_pretrained(tmp_path / "model")
    ipex.llm.save(base, tmp_path / "base")
    assert type(ipex.llm.load(tmp_path / "base")) is transformers.LlamaModel
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(hidden(model.model, tokens), hidden(base, tokens))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # a float head, tied as that of a float directory
    assert kinds(model.model) == kinds(base)


def speech(biases):
    """Its initializers reach into the feature projection, for its weight, bias and in_features."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    convolutions = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.Wav2Vec2Config(**sizes, **convolutions, **position, vocab_size=40)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1 and "norm" in name), 0.15)
        if name.endswith("bias") and not biases:
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("biases", [False, True])
def test_a_speech_encoder_comes_back_bit_equal(tmp_path, biases):
    wave = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    model = ipex.llm.optimize(speech(biases), quantization_config=MAPPING, inplace=True)
    ipex.llm.save(model, tmp_path / "model")
    again = ipex.llm.load(tmp_path / "model")
    assert (again.wav2vec2.feature_projection.projection.bias is None) is not biases
    assert torch.equal(again(wave).logits, model(wave).logits)
    base = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(base(wave).last_hidden_state, model.wav2vec2(wave).last_hidden_state)


def test_an_int8_convolution_in_an_encoder_comes_back(tmp_path):
    wave = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    model = int8(speech(False), {"input_values": wave})
    ipex.llm.save(model, tmp_path / "model")
    assert torch.equal(ipex.llm.load(tmp_path / "model")(wave).logits, model(wave).logits)


@pytest.mark.parametrize("architecture", ["Clip", "Beit", "Data2Vec"])
def test_encoders_whose_initializers_reach_for_their_children(tmp_path, architecture):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    images = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if architecture == "Clip":
        text = {**sizes, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, **images}, projection_dim=24)
        model = transformers.CLIPModel(config)
        inputs = {"input_ids": torch.tensor([[1, 5, 7, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    elif architecture == "Beit":
        model = transformers.BeitForImageClassification(transformers.BeitConfig(**sizes, **images))
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    else:
        model = transformers.Data2VecVisionForImageClassification(transformers.Data2VecVisionConfig(**sizes, **images))
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    model = ipex.llm.optimize(model.eval(), quantization_config=MAPPING, inplace=True)
    ipex.llm.save(model, tmp_path / "model")
    again, expected = ipex.llm.load(tmp_path / "model")(**inputs), model(**inputs)
    names = [name for name in expected if name.startswith("logits")]
    assert names
    assert all(torch.equal(again[name], expected[name]) for name in names)
