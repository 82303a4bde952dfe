"""`from_pretrained` and `load`: every kind of directory, and what is wrong with one."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ipex_quant as ipex
from ipex_quant.checkpoints import gptq_tensors
from ipex_quant.nn import WeightOnlyQuantizedExperts, WeightOnlyQuantizedLinear
from ipex_quant.nn.stacked_experts import expert_weight
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 32)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2"}


def mapping(**options):
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, **options)


def gptq_directory(model, directory, config=CONFIG):
    """Write a GPTQ checkpoint of the linear layers in the blocks of `model`, and return its tensors."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "proj" not in name}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        weights = {}
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            weights[name] = module.weight
        elif hasattr(module, "gate_up_proj"):
            for expert in range(module.num_experts):
                gate, up = expert_weight(module, "gate_up", expert).chunk(2)
                parts = {"gate_proj": gate, "up_proj": up, "down_proj": expert_weight(module, "down", expert)}
                weights |= {f"{name}.{expert}.{part}": weight for part, weight in parts.items()}
        for each, weight in weights.items():
            tensors = gptq_tensors(affine.quantize(weight, SCHEME), v2=True)
            state |= {f"{each}.{key}": tensor for key, tensor in tensors.items()}
    model.config.save_pretrained(directory)
    text = json.loads((directory / "config.json").read_text())
    text |= {"architectures": [type(model).__name__], "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(text | {"quantization_config": config}))
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    return state


@pytest.fixture
def directory(llama, tmp_path):
    gptq_directory(llama, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe"])
def test_a_checkpoint_is_what_optimize_makes_of_it(name, make_model, logits, tmp_path):
    state = gptq_directory(make_model(name), tmp_path)
    model = ipex.llm.from_pretrained(tmp_path)
    expected = ipex.llm.optimize(make_model(name), low_precision_checkpoint=(state, CONFIG))
    assert torch.equal(logits(model), logits(expected))
    assert not model.training
    assert ipex.explain(model).rows == ipex.explain(expected).rows
    if name == "qwen3_moe":
        assert isinstance(model.model.layers[0].mlp.experts, WeightOnlyQuantizedExperts)


def test_dtype_compute_mode_and_cache(directory):
    options = {"quantization_config": mapping(lowp_mode=WoqLowpMode.INT8), "kv_cache_dtype": torch.int8}
    model = ipex.llm.from_pretrained(directory, torch.bfloat16, **options)
    layer = model.model.layers[1].mlp.up_proj
    assert (model.dtype, layer.weight.dtype, layer.lowp_mode) == (torch.bfloat16, torch.bfloat16, WoqLowpMode.INT8)
    assert (model.config.dtype, model.config.quantization_config["kv_cache_dtype"]) == (torch.bfloat16, "int8")


def test_it_can_be_saved_and_comes_back(directory, logits, tmp_path):
    model = ipex.llm.from_pretrained(directory)
    ipex.llm.save(model, tmp_path / "saved")
    for again in (ipex.llm.from_pretrained(tmp_path / "saved"), ipex.llm.load(tmp_path / "saved")):
        assert torch.equal(logits(again), logits(model))
    assert ipex.llm.from_pretrained(tmp_path / "saved", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quantized already; leave it out"):
        ipex.llm.from_pretrained(tmp_path / "saved", quantization_config=mapping())


def test_load_takes_any_quantized_model(directory, logits):
    assert torch.equal(logits(ipex.llm.load(directory)), logits(ipex.llm.from_pretrained(directory)))


def test_a_float_model_stays_one_unless_asked(llama, logits, tmp_path):
    llama.save_pretrained(tmp_path)
    plain = ipex.llm.from_pretrained(tmp_path)
    assert not any(isinstance(module, WeightOnlyQuantizedLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain), logits(llama), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_model_is_quantized_as_by_optimize(any_model, logits, tmp_path, dtype):
    any_model.save_pretrained(tmp_path)
    config = mapping(lowp_mode=WoqLowpMode.INT8).set_module_name("lm_head", None)
    loaded = ipex.llm.from_pretrained(tmp_path, dtype, config)
    plain = type(any_model).from_pretrained(tmp_path, dtype=dtype)
    expected = ipex.llm.optimize(plain, dtype=dtype, quantization_config=config)
    assert torch.equal(logits(loaded), logits(expected))
    assert ipex.explain(loaded).rows == ipex.explain(expected).rows


def test_linear_layers_of_a_float_model_are_never_in_float(llama, tmp_path, monkeypatch):
    llama.save_pretrained(tmp_path)
    linears = []
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda module: linears.append(module.weight.device.type))
    ipex.llm.from_pretrained(tmp_path, quantization_config=mapping())
    assert len(linears) == 15
    assert set(linears) == {"meta"}


def test_the_generation_config_is_read(directory):
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(directory)
    assert ipex.llm.from_pretrained(directory).generation_config.max_new_tokens == 7


def test_a_sharded_checkpoint(directory, logits):
    expected = logits(ipex.llm.from_pretrained(directory))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(ipex.llm.from_pretrained(directory)), expected)


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.qweight"), rf"{NAME}\.qweight: missing, .*complete"),
        (lambda t: [t.pop(f"{NAME}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")], rf"{NAME}\.weight"),
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors of a LlamaForCausalLM.*model\.norm\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"mismatched_keys.*model\.norm\.weight"),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:1].clone()}), rf"{NAME}\.scales: expected shape"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.qweight": t[f"{NAME}.qweight"].clone()}), "no place for 1 of"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_named(directory, change, message):
    change_tensors(directory, change)
    with pytest.raises(ValueError, match=message):
        ipex.llm.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(quant_method="eetq"), r"quant_method: expected one of .*got 'eetq'"),
        (lambda c: c["quantization_config"].update(bits=5), r"bits: expected one of \[2, 3, 4, 8\]"),
        (lambda c: c.update(architectures=["NoSuchModel"]), "has no model NoSuchModel"),
        (lambda c: c.update(hidden_size="x"), "transformers cannot make a model of it|hidden_size"),
    ],
)
def test_configurations_that_are_not_supported_are_named(directory, change, message):
    change_config(directory, change)
    with pytest.raises(ValueError, match=message):
        ipex.llm.from_pretrained(directory)


def test_arguments_and_directories_are_checked(directory, tmp_path):
    with pytest.raises(ValueError, match=r"expected a directory with a config\.json"):
        ipex.llm.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float32, .*got torch\.int8"):
        ipex.llm.from_pretrained(directory, torch.int8)
    (directory / "model.safetensors").rename(directory / "model.pth.old")
    with pytest.raises(ValueError, match="no checkpoint file"):
        ipex.llm.from_pretrained(directory)
    change_config(directory, lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"expected weights in \*\.safetensors .*found none"):
        ipex.llm.from_pretrained(directory)


@pytest.mark.parametrize("way", ["directory", "checkpoint"])
def test_factors_of_inputs_multiply_them_and_are_not_lost(directory, llama, logits, way):
    expected = ipex.llm.from_pretrained(directory)
    factor = torch.rand(64) + 0.5

    def wrap(tensors):
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{NAME}.linear.{key}"] = tensors.pop(f"{NAME}.{key}")
        tensors[f"{NAME}.input_scale"] = factor

    change_tensors(directory, wrap)
    if way == "directory":
        model = ipex.llm.from_pretrained(directory)
    else:
        checkpoint = ipex.llm.utils.load_low_precision_checkpoint(directory)
        model = ipex.llm.optimize(llama, low_precision_checkpoint=checkpoint)
        assert not llama.model.layers[1].mlp.up_proj._forward_pre_hooks
    before = expected.model.layers[1].mlp.up_proj
    weight = before.dequantized_weight(torch.float32)
    assert not torch.equal(logits(model), logits(expected))
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj(x), x * factor @ weight.T, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        scaled = torch.nn.Linear(64, len(weight), bias=False)
        scaled.weight.copy_(weight * factor)
    expected.model.layers[1].mlp.up_proj = scaled
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"1 layers multiply their input by factors .*up_proj"):
        ipex.llm.save(model, directory / "saved")


def test_w8a8_layers_are_int8(llama, tmp_path, logits):
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    activations = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    gptq_directory(llama, tmp_path, config)

    def requantize(tensors):
        for name in [name for name in tensors if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]:
            del tensors[name]
        for name, module in llama.model.layers.named_modules(prefix="model.layers"):
            if isinstance(module, torch.nn.Linear):
                scales = module.weight.abs().amax(1, keepdim=True) / 127
                tensors[f"{name}.weight"] = (module.weight / scales).round().to(torch.int8)
                tensors[f"{name}.weight_scale"] = scales

    with torch.no_grad():
        change_tensors(tmp_path, requantize)
    model = ipex.llm.from_pretrained(tmp_path)
    assert isinstance(model.model.layers[0].mlp.down_proj, ipex.nn.Int8Linear)
    assert model.model.layers[0].mlp.down_proj.activation is None
    error = (logits(model) - logits(llama)).norm() / logits(llama).norm()
    assert error < 0.05
