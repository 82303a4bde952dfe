"""Adapters of the peft library on quantized models, against the float model that they stand for."""

import copy

import peft
import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.nn import QuantizedModule
from ipex_quant.quantization import (
    WoqWeightDtype,
    convert,
    default_dynamic_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 96}
TOKENS = torch.arange(3, 51).reshape(2, 24)


def weight_only(model):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8, group_size=32)
    return ipex.llm.optimize(model, quantization_config=mapping)


def int8(model):
    return ipex.llm.optimize(convert(prepare(model, default_dynamic_qconfig_mapping, TOKENS)))


@pytest.fixture(params=[weight_only, int8])
def pair(request):
    """A quantized model, and a float model with the weights that it stands for."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    quantized = request.param(model)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedModule):
            model.get_submodule(name).weight.data = module.weight.clone()
    return quantized, model


def adapted(pair, **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    ours, reference = (peft.get_peft_model(each, copy.deepcopy(config)) for each in pair)
    adapter = {name: tensor for name, tensor in ours.state_dict().items() if "lora_" in name}
    assert len(adapter) == 8
    reference.load_state_dict(adapter, strict=False)
    return ours, reference


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def tolerance(model):
    return 1e-5 if any("WeightOnly" in type(module).__name__ for module in model.modules()) else 0.03


@torch.no_grad()
def test_an_adapter_adds_what_it_adds_in_float(pair):
    plain = pair[0](TOKENS).logits
    ours, reference = adapted(pair, init_lora_weights=False)
    assert relative(ours(TOKENS).logits, reference(TOKENS).logits) < tolerance(ours)
    assert relative(ours(TOKENS).logits, plain) > 0.1
    with ours.disable_adapter():
        assert relative(ours(TOKENS).logits, plain) < tolerance(ours)


@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_an_adapter_is_merged_and_taken_out(pair, safe):
    ours, reference = adapted(pair, init_lora_weights=False)
    expected = reference(TOKENS).logits
    ours.merge_adapter(safe_merge=safe)
    assert relative(ours(TOKENS).logits, expected) < 0.05
    ours.unmerge_adapter()
    assert relative(ours(TOKENS).logits, expected) < 0.05
    merged = ours.merge_and_unload(safe_merge=safe)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, QuantizedModule)
    assert relative(merged(TOKENS).logits, expected) < 0.05


def test_an_adapter_is_trained(pair):
    gradients = []
    for model in adapted(pair):
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert relative(*gradients) < 10 * tolerance(pair[0])


def test_transformers_trains_adapters_alone(pair, tmp_path):
    ipex.llm.save(pair[0], tmp_path / "model")
    ours = ipex.llm.load(tmp_path / "model")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.trainer_utils.validate_quantization_for_training(ours)
    ours.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    transformers.trainer_utils.validate_quantization_for_training(ours)


def test_an_adapter_is_saved_and_loaded(pair, tmp_path):
    ours, _ = adapted(pair, init_lora_weights=False)
    with torch.no_grad():
        expected = ours(TOKENS).logits
    ours.save_pretrained(tmp_path)
    base = ours.unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert relative(loaded(TOKENS).logits, expected) < 1e-6


def test_a_prompt_is_trained_before_a_quantized_embedding():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)
    mapping.set_object_type(torch.nn.Embedding, mapping.global_qconfig)
    quantized = ipex.llm.optimize(model, quantization_config=mapping)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ours = peft.get_peft_model(quantized, config)
    ours.word_embeddings = quantized.get_input_embeddings()  # which peft looks for among parameters
    ours(input_ids=TOKENS, labels=TOKENS).loss.backward()
    (prompt,) = [p for p in ours.parameters() if p.requires_grad]
    assert prompt.grad.abs().sum() > 0
