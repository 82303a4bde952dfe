"""Mixtures of experts in vLLM, in float32, against transformers with the dequantized weights."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ipex_quant import ops
from ipex_quant.checkpoints.gptq import gptq_tensors
from ipex_quant.conversion.description import METHOD, VERSION
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_stack import QuantizedStack
from ipex_quant.numerics.saved_weight import to_saved
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

SCHEME = WeightScheme(WoqWeightDtype.INT4, symmetric=False, group_size=32)
ENTRY = {
    "kind": "weight_only_experts",
    "weight_dtype": "int4",
    "symmetric": False,
    "group_size": 32,
    "act_order": [False, False],
    "bias": [False, False],
    "lowp_mode": "none",
    "act_quant_mode": "none",
}


def small_model(vocabulary):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.1,
        max_position_embeddings=256,
        dtype="float32",
    )
    return transformers.Qwen3MoeForCausalLM(config).float().eval()


def quantized(weights, dtype=torch.float16):
    """Experts' weights ``[E, N, K]`` rounded to nearest, with scales that `dtype` holds."""
    rounded = [ops.quantize_weight(weight, SCHEME) for weight in weights]
    scales = [weight.scales.to(dtype).float() for weight in rounded]
    return [affine.quantize(w, SCHEME, s, q.zero_points) for w, s, q in zip(weights, scales, rounded, strict=True)]


def quantize_experts(model):
    """Quantize the experts of `model`, which keeps the dequantized values; the weights by layer and projection."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            found[name] = {}
            for projection in ("gate_up", "down"):
                parameter = getattr(module, f"{projection}_proj")
                found[name][projection] = quantized(parameter.data)
                parameter.data = torch.stack([affine.dequantize(each) for each in found[name][projection]])
    return found


def saved_tensors(experts):
    """The tensors of `llm.save`."""
    return {
        f"{name}.{projection}_{key}": tensor
        for name, projections in experts.items()
        for projection, weights in projections.items()
        for key, tensor in to_saved(QuantizedStack.of(weights)).items()
    }


def gptq_checkpoint(experts):
    """The tensors of a GPTQ checkpoint, which has a module for each projection of each expert."""
    tensors = {}
    for name, projections in experts.items():
        for index, weight in enumerate(projections["gate_up"]):
            half = weight.shape[0] // 2
            parts = {"gate_proj": weight.select(slice(0, half)), "up_proj": weight.select(slice(half, None))}
            parts["down_proj"] = projections["down"][index]
            for part, own in parts.items():
                for key, tensor in gptq_tensors(own, v2=True).items():
                    tensors[f"{name}.{index}.{part}.{key}"] = tensor
    return tensors


@pytest.mark.parametrize("kind", ["saved", "gptq"])
def test_experts(kind, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("IPEX_QUANT_VLLM_LOWP", "none")
    model = small_model(len(tokenizer))
    experts = quantize_experts(model)
    model.save_pretrained(tmp_path, save_original_format=False)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".mlp.experts." not in name}
    config = json.loads((tmp_path / "config.json").read_text())
    if kind == "saved":
        tensors |= saved_tensors(experts)
        modules = dict.fromkeys(experts, ENTRY)
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "dtype": "float32",
            "modules": modules,
        }
    else:
        tensors |= gptq_checkpoint(experts)
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "sym": False,
            "desc_act": False,
            "checkpoint_format": "gptq_v2",
        }
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts, dtype="float32"))
