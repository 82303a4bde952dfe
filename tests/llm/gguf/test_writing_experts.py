"""Models with experts, and Gemma 4, are written to GGUF, and read back as they were."""

from dataclasses import replace

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.checkpoints import open_gguf
from ipex_quant.checkpoints.writers.gguf import GgufData, stacked_data
from ipex_quant.llm.saved.gguf_parts import model_metadata
from ipex_quant.nn import WeightOnlyQuantizedExperts
from ipex_quant.quantization import WoqWeightDtype, WoqWeightQScheme, get_weight_only_quant_qconfig_mapping
from ipex_quant.recipes.load import quantized
from ipex_quant.recipes.recipe import Gptq, Recipe

VARIANTS = {"mixtral": "llama", "gemma4-experts": "gemma4"}
NAMES = ("gemma4", "gemma4-experts", "gpt-oss", "minimax-m2", "mixtral", "qwen2moe", "qwen3moe")
IDS = torch.arange(3, 15).view(2, 6)


def export(model, folder):
    ipex.llm.export(model, folder / "out", "gguf")
    return open_gguf(folder / "out" / "model.gguf")


def raw(tensor):
    return tensor.stored[...].contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_becomes_the_same_file(name, make_tiny, gguf_of, tmp_path):
    source = open_gguf(gguf_of(make_tiny(name), name, VARIANTS.get(name, name), "Q8_0"))
    model = ipex.llm.from_pretrained(source.path, torch.float32)
    assert any(isinstance(module, WeightOnlyQuantizedExperts) for module in model.modules()) == (name != "gemma4")
    written = export(model, tmp_path)
    joined = {key: key.replace("gate_up", "{}") for key in source.tensors if "gate_up" in key}
    parts = {name.format(part) for name in joined.values() for part in ("gate", "up")}
    assert written.tensors.keys() == (source.tensors.keys() - joined.keys()) | parts
    for key, name in joined.items():  # which llama.cpp reads in two tensors, too
        both = [written.tensors[name.format(part)].stored[...] for part in ("gate", "up")]
        assert torch.equal(torch.cat(both, dim=1), source.tensors[key].stored[...])
    for key, tensor in ((key, tensor) for key, tensor in source.tensors.items() if key not in joined):
        assert (key, tensor.kind, tensor.stored.shape) == (
            key,
            written.tensors[key].kind,
            written.tensors[key].stored.shape,
        )
        assert torch.equal(raw(tensor), raw(written.tensors[key]))
    told = {key: value for key, value in source.metadata.items() if value and not key.startswith("tokenizer")}
    assert {key: written.metadata.get(key) for key in told} == told
    again = ipex.llm.from_pretrained(written.path, torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_in_mxfp4(make_tiny, gguf_of, write_gguf, tmp_path):
    source = open_gguf(gguf_of(make_tiny("gpt-oss"), "gpt-oss", "gpt-oss", "Q8_0"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in source.tensors.items():
        stored = tensor.stored[...]
        tensors[name] = (tensor.kind, stored) if tensor.kind else stored
        if "exps.weight" in name:
            blocks = torch.randint(256, (*stored.shape[:2], stored.shape[2] // 34, 17), generator=generator)
            blocks[..., 0] = 122 + blocks[..., 0] % 3
            tensors[name] = "MXFP4", blocks.to(torch.uint8).flatten(2)
    source = open_gguf(write_gguf(tmp_path / "mx.gguf", source.metadata, tensors))
    model = ipex.llm.from_pretrained(source.path, torch.float32)
    written = export(model, tmp_path)
    assert {tensor.kind for name, tensor in written.tensors.items() if "exps.weight" in name} == {"MXFP4"}
    assert all(torch.equal(raw(tensor), raw(written.tensors[name])) for name, tensor in source.tensors.items())
    again = ipex.llm.from_pretrained(written.path, torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore:(gptq|GPTQ)")
@pytest.mark.parametrize(("dtype", "kind"), [(WoqWeightDtype.INT4, "Q4_0"), (WoqWeightDtype.IQ4, "IQ4_NL")])
def test_what_gptq_quantizes_here(dtype, kind, make_tiny, tmp_path):
    make_tiny("qwen3moe").save_pretrained(tmp_path / "float")
    scheme = {"weight_dtype": dtype, "weight_qscheme": WoqWeightQScheme.SYMMETRIC, "group_size": 32}
    settings = Gptq(**scheme, samples=2, sequence_length=16)
    batches = [{"input_ids": IDS + number} for number in range(2)]
    model, _ = quantized(Recipe("q4", settings, skip=("lm_head",)), tmp_path / "float", torch.float32, batches)
    written = export(model, tmp_path)
    assert {tensor.kind for name, tensor in written.tensors.items() if "exps" in name} == {kind}
    again = ipex.llm.from_pretrained(written.path, torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_that_stay_in_float(make_tiny, tmp_path):
    model = make_tiny("qwen3moe")
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32)
    mapping.set_module_name_regex(r".*(experts|lm_head|[vko]_proj).*", None)
    model = ipex.llm.optimize(model, quantization_config=mapping)
    for layer in model.model.layers:
        layer.self_attn.q_proj = with_half_scales(layer.self_attn.q_proj)
    written = export(model, tmp_path)
    assert tuple(written.tensors["blk.1.ffn_gate_exps.weight"].stored.shape) == (4, 64, 64)
    again = ipex.llm.from_pretrained(written.path, torch.float32, mapping)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def with_half_scales(module):
    weight = module.quantized_weight()
    scales, zeros = torch.full_like(weight.scales, 2.0**-6), torch.full_like(weight.zero_points, 8)
    return type(module).from_quantized_weight(replace(weight, scales=scales, zero_points=zeros), module.float_bias)


SCALED = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob: llama.cpp has True in this model, got False"),
        ("qwen2moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: llama.cpp has \[\] in this model, got \[1\]"),
        ("qwen2moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: llama.cpp has 1 in this model, got 2"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit: llama.cpp has 7.0 in this model, got 5.0"),
        (
            "gpt-oss",
            {"layer_types": ["full_attention"] * 2},
            "layer_types: llama.cpp has 1 layers with a window before",
        ),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention: GGUF is written of models"),
        ("gemma4", {"rope_parameters": SCALED}, "rope_parameters: GGUF is written of positions that are not scaled"),
        ("mixtral", {"sliding_window": 4}, "sliding_window: GGUF is written of models without it, got 4"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(name, changes, message, make_tiny):
    config = make_tiny(name).config
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        model_metadata(config)


def test_all_experts_have_one_type():
    q4 = GgufData("Q4_0", (2, 32), lambda: torch.zeros(36, dtype=torch.uint8), 36)
    q8 = GgufData("Q8_0", (2, 32), lambda: torch.ones(68, dtype=torch.uint8), 68)
    with pytest.raises(ValueError, match="their types are Q4_0, Q8_0"):
        stacked_data([q4, q8])
    with pytest.raises(ValueError, match=r"their shapes are \(2, 32\), \(3, 32\)"):
        stacked_data([q4, replace(q4, shape=(3, 32))])
    stack = stacked_data([q8, q8, q8])
    assert (stack.kind, stack.shape, stack.nbytes, len(stack.make())) == ("Q8_0", (3, 2, 32), 204, 204)
