"""`quantized`: the same model as `apply_recipe` makes of the whole float model, in less memory."""

import importlib
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import ipex_quant as ipex
from ipex_quant import evaluation
from ipex_quant.llm.saved import rounding
from ipex_quant.llm.saved.float_models import load_float_model
from ipex_quant.llm.saved.notes import recipe_note
from ipex_quant.nn.stored_linear import StoredLinear
from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ipex_quant.recipes import load
from ipex_quant.recipes.apply import apply_recipe
from ipex_quant.recipes.recipe import AutoRound, Awq, Dynamic, Gptq, Recipe, SmoothQuant, Static, WeightOnly

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96, attention_bias=True)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96, tie_word_embeddings=True)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
}
RECIPES = {
    "rtn": Recipe("rtn", WeightOnly(group_size=32)),
    "gptq": Recipe("gptq", Gptq(group_size=32, samples=2, sequence_length=16)),
    **{
        name: Recipe(
            name,
            kind(
                group_size=32,
                lowp_mode=WoqLowpMode.INT8,
                weight_qscheme=WoqWeightQScheme.SYMMETRIC,
                schemes={
                    r".*\.1\.mlp": WeightScheme(WoqWeightDtype.INT4, False, 16),
                    r"lm_head|.*embed_tokens": WeightScheme(WoqWeightDtype.INT5, False, 32),
                },
            ),
        )
        for name, kind in (("rtn_schemes", WeightOnly), ("gptq_schemes", partial(Gptq, samples=2, sequence_length=16)))
    },
    "gptq_skip": Recipe("gptq_skip", Gptq(group_size=32, samples=2, sequence_length=16), skip=(r".*\.down_proj",)),
    "awq": Recipe("awq", Awq(group_size=32, samples=2, sequence_length=16, tokens=16)),
    "awq_gptq": Recipe("awq_gptq", Awq(group_size=32, samples=2, sequence_length=16, tokens=16, gptq=True)),
    "auto_round": Recipe(
        "auto_round", AutoRound(weight_dtype=WoqWeightDtype.INT4, group_size=32, samples=2, sequence_length=16, steps=4)
    ),
    "dynamic": Recipe("dynamic", Dynamic()),
    "dynamic_weight_only": Recipe("dynamic_weight_only", Dynamic(weight_only=(r".*\.down_proj",))),
    "smoothquant_weight_only": Recipe(
        "smoothquant_weight_only", SmoothQuant(samples=2, sequence_length=16, weight_only=(r".*\.down_proj",))
    ),
    "static": Recipe("static", Static(samples=2, sequence_length=16)),
}
BATCHES = [{"input_ids": torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(i))} for i in range(2)]


@pytest.mark.filterwarnings("ignore:(gptq|awq|auto_round|GPTQ|most weights)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_that_of_the_whole_model(name, recipe, dtype, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path)
    loaded, before = load.quantized(RECIPES[recipe], tmp_path, dtype, BATCHES)
    whole = load_float_model(tmp_path, dtype)
    size = evaluation.model_bytes(whole)
    expected = apply_recipe(RECIPES[recipe], whole, BATCHES, dtype)
    with torch.inference_mode():
        assert torch.equal(loaded(**BATCHES[0]).logits, expected(**BATCHES[0]).logits)
    assert str(ipex.explain(loaded)).splitlines()[1:] == str(ipex.explain(expected)).splitlines()[1:]
    assert (recipe_note(loaded), loaded.dtype) == (recipe, dtype)
    assert before == size
    assert not any(isinstance(module, StoredLinear) for module in loaded.modules())


def test_experts_are_rounded_one_by_one(tmp_path, monkeypatch):
    torch.manual_seed(0)
    MODELS["qwen3_moe"]().save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in load_file(tmp_path / "model.safetensors")
    shapes = set()
    quantize = rounding.ops.quantize_weight

    def seen(weight, *arguments):
        shapes.add(tuple(weight.shape))
        return quantize(weight, *arguments)

    monkeypatch.setattr(rounding.ops, "quantize_weight", seen)
    load.quantized(Recipe("rtn", WeightOnly(group_size=32), skip=(r".*_proj$", "lm_head")), tmp_path, torch.float32)
    assert shapes == {(32, 64), (64, 32)}


@pytest.mark.parametrize("recipe", ["gptq", "awq"])
def test_one_block_is_in_memory_at_a_time(recipe, tmp_path, monkeypatch):
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path)
    held = []

    def counted(quantize_blocks):
        def run(model, *args, **kwargs):
            layers = [each for each in model.modules() if isinstance(each, StoredLinear)]

            def count(*_):
                held.append(sum(layer.weight.untyped_storage().nbytes() > 4 for layer in layers))

            for layer in layers:
                layer.register_forward_pre_hook(count)
            return quantize_blocks(model, *args, **kwargs)

        return run

    place = "ipex_quant.conversion.gptq.quantize_blocks" if recipe == "gptq" else "ipex_quant.conversion.awq.awq_blocks"
    module, name = place.rsplit(".", 1)

    original = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(place, counted(original))
    load.quantized(RECIPES[recipe], tmp_path, torch.float32, BATCHES)
    assert (min(held), max(held)) == (0, 7)  # none while the model runs as a whole, then those of a block


@pytest.mark.parametrize("settings", [Dynamic(), WeightOnly(group_size=32), RECIPES["gptq"].settings])
def test_a_rotated_model(settings, tmp_path):
    torch.manual_seed(0)
    model = MODELS["tied"]().eval()
    model.save_pretrained(tmp_path / "float")
    loaded, _ = load.quantized(Recipe("rotated", settings, rotate=True), tmp_path / "float", torch.bfloat16, BATCHES)
    plain, _ = load.quantized(Recipe("plain", settings), tmp_path / "float", torch.bfloat16, BATCHES)
    ipex.llm.save(loaded, tmp_path / "saved")
    with torch.inference_mode():
        expected = model(**BATCHES[0]).logits
        logits, without = (each(**BATCHES[0]).logits for each in (loaded, plain))
        assert torch.equal(ipex.llm.load(tmp_path / "saved")(**BATCHES[0]).logits, logits)
    assert not torch.equal(logits, without)
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    assert loaded.dtype == torch.bfloat16
