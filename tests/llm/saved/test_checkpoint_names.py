"""Checkpoints with the names that older releases of transformers had for the same architecture."""

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.checkpoints import gptq_tensors
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 32)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2"}
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 96, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def llava():
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT))
    return transformers.LlavaForConditionalGeneration(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


MODELS = {
    # before 4.52
    "qwen2_vl": (qwen2_vl, {"model.language_model.": "model.", "model.visual.": "visual."}),
    "llava": (
        llava,
        {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
    ),
    "llama without its head": (llama, {"model.": ""}),
}


def build(make, seed):
    model = make().eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


def checkpoint_of(model):
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            qw = affine.quantize(state.pop(f"{name}.weight"), SCHEME)
            state |= {f"{name}.{key}": value for key, value in gptq_tensors(qw, v2=True).items()}
    return state


def renamed(state, names):
    def old(name):
        for new, before in names.items():
            if name.startswith(new):
                return before + name.removeprefix(new)
        return name

    return {old(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("family", MODELS)
def test_all_that_counts_comes_from_a_checkpoint_with_older_names(family):
    make, names = MODELS[family]
    state = checkpoint_of(build(make, 0))
    assert renamed(state, names).keys() != state.keys()
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    found = []
    for tensors in (state, renamed(state, names)):
        model = build(make, 1)  # with other weights
        model = ipex.llm.optimize(model, quantization_config=mapping, low_precision_checkpoint=(tensors, CONFIG))
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    original = build(make, 0).state_dict()
    plain = [name for name in found[0] if name in original]
    assert plain
    assert all(torch.equal(found[1][name], original[name]) for name in plain)


def test_two_tensors_of_one_name_are_refused():
    state = checkpoint_of(build(qwen2_vl, 0))
    old = renamed(state, MODELS["qwen2_vl"][1])
    name = "model.language_model.norm.weight"
    with pytest.raises(ValueError, match="is a second tensor for model.language_model.norm.weight".replace(".", r"\.")):
        ipex.llm.optimize(build(qwen2_vl, 1), low_precision_checkpoint=({**old, name: state[name]}, CONFIG))


def test_rules_of_the_configuration_go_by_the_names_in_the_file():
    """Two layers of other bits than the rest, found by a pattern that begins with the older name."""
    model = build(qwen2_vl, 0)
    state = checkpoint_of(model)
    name = "model.language_model.layers.1.mlp.up_proj"
    qw = affine.quantize(model.get_submodule(name).weight.detach(), WeightScheme(WoqWeightDtype.INT8, False, 32))
    state |= {f"{name}.{key}": value for key, value in gptq_tensors(qw, v2=True).items()}
    old = renamed(state, MODELS["qwen2_vl"][1])
    config = CONFIG | {"dynamic": {r"+:model\.layers\.1\.mlp\.up": {"bits": 8}}}
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    loaded = ipex.llm.optimize(model, quantization_config=mapping, low_precision_checkpoint=(old, config))
    assert str(loaded.get_submodule(name).scheme) == "int8 asym g32"
    assert str(loaded.get_submodule(name.replace("layers.1", "layers.0")).scheme) == "int4 asym g32"
