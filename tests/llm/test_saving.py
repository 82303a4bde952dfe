import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ipex_quant as ipex
from ipex_quant.evaluation import model_bytes
from ipex_quant.llm.saved.hf_quantizer import IpexQuantizer
from ipex_quant.nn import Int8Conv, Int8Linear, Int8Recurrent, SplitMultiheadAttention, WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import PER_CHANNEL
from ipex_quant.quantization import (
    WoqLowpMode,
    WoqWeightDtype,
    convert,
    default_dynamic_qconfig_mapping,
    default_static_qconfig_mapping,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)


def optimized(model, dtype=torch.bfloat16, **options):
    options = {"weight_dtype": WoqWeightDtype.INT4, "group_size": 32, "lowp_mode": WoqLowpMode.INT8, **options}
    mapping = get_weight_only_quant_qconfig_mapping(**options)
    return ipex.llm.optimize(model, dtype=dtype, quantization_config=mapping, inplace=True)


def int8(model, inputs, mapping=None):
    prepared = prepare(model, mapping or get_smooth_quant_qconfig_mapping(), example_kwarg_inputs=inputs)
    prepared(**inputs)
    return convert(prepared)


@pytest.fixture
def int8_llama(llama, tokens):
    return int8(llama, tokens(llama))


@pytest.fixture
def saved_int8(int8_llama, tmp_path):
    ipex.llm.save(int8_llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def saved(llama, tmp_path):
    ipex.llm.save(optimized(llama), tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_any_model_comes_back_bit_equal(any_model, logits, tmp_path):
    model = optimized(any_model)
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert str(ipex.explain(loaded)).splitlines()[-1] == str(ipex.explain(model)).splitlines()[-1]
    assert loaded.config.quantization_config == model.config.quantization_config
    loaded.tie_weights()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight_dtype", list(WoqWeightDtype))
def test_every_weight_and_activation_dtype(llama, logits, tmp_path, weight_dtype, dtype):
    model = optimized(llama, dtype, weight_dtype=weight_dtype, lowp_mode=WoqLowpMode.NONE)
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_every_tensor_keeps_its_own_dtype(llama, logits, tmp_path):
    llama.model.norm.to(torch.float64)
    model = optimized(llama)
    model.model.norm.to(torch.float32).weight.normal_()
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert loaded.model.norm.weight.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_saves_and_loads_it_too(llama, logits, tmp_path):
    model = optimized(llama)
    model.save_pretrained(tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = ipex.llm.load(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    assert isinstance(loaded.lm_head, WeightOnlyQuantizedLinear)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_converted_model_is_saved_as_it_is(make_model, logits, tmp_path, name):
    float_model = make_model(name)
    prepared = prepare(float_model, get_weight_only_quant_qconfig_mapping())
    model = convert(prepared)
    model.save_pretrained(tmp_path / "first")
    ipex.llm.save(model, tmp_path / "second")
    first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    second = ipex.llm.load(tmp_path / "second")
    assert isinstance(first.lm_head, WeightOnlyQuantizedLinear)
    assert torch.equal(logits(first), logits(model))
    assert torch.equal(logits(second), logits(model))
    model.tie_weights()
    assert torch.equal(logits(second), logits(model))
    for untouched in (float_model, prepared):
        assert not hasattr(untouched.config, "quantization_config")
        assert untouched.all_tied_weights_keys == make_model(name).all_tied_weights_keys


@pytest.mark.parametrize("save", [ipex.llm.save, lambda model, folder: model.save_pretrained(folder)])
def test_the_description_is_that_of_the_model_when_it_is_saved(llama, logits, tmp_path, save):
    model = optimized(llama).half()
    model.lm_head = torch.nn.Linear(64, 96, bias=False, dtype=torch.float16)
    save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert loaded.dtype == torch.float16
    assert type(loaded.lm_head) is torch.nn.Linear
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    model.model.rotary_emb = loaded.model.rotary_emb  # half() rounds its frequencies too, and they are not saved
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama_tied", "opt", "gpt2", "t5"])
@pytest.mark.parametrize(
    "mapping", [get_smooth_quant_qconfig_mapping(), default_dynamic_qconfig_mapping], ids=["smoothed", "per_token"]
)
def test_an_int8_model_comes_back_bit_equal_with_its_groups(make_model, tokens, logits, tmp_path, name, mapping):
    float_model = make_model(name)
    model = int8(float_model, tokens(float_model), mapping)
    ipex.llm.save(model, tmp_path / "model")
    model.save_pretrained(tmp_path / "second")
    loaded = ipex.llm.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(ipex.llm.load(tmp_path / "second")), logits(model))
    assert str(ipex.explain(loaded)).splitlines()[1:-1] == str(ipex.explain(model)).splitlines()[1:-1]
    assert loaded.config.quantization_config == model.config.quantization_config

    def groups(model):
        return {id(module.share_group) for module in model.modules() if isinstance(module, Int8Linear)}

    assert len(groups(loaded)) == len(groups(model))


def test_a_mixture_of_kinds(llama, tokens, logits, tmp_path):
    weight_only = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4).global_qconfig
    mapping = get_smooth_quant_qconfig_mapping().set_module_name("lm_head", weight_only)
    mapping = mapping.set_module_name("model.layers.0.self_attn.o_proj", None)
    model = int8(llama, tokens(llama), mapping).to(torch.bfloat16)
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert isinstance(loaded.lm_head, WeightOnlyQuantizedLinear)
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.share_group is attention.v_proj.share_group
    assert attention.q_proj.weight.dtype == attention.o_proj.weight.dtype == torch.bfloat16
    loaded.model.rotary_emb = model.model.rotary_emb  # to() rounds its frequencies too, and they are not saved
    assert torch.equal(logits(loaded), logits(model))


def test_a_convolution(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = int8(transformers.ViTForImageClassification(config).eval(), inputs, default_static_qconfig_mapping)
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert any(isinstance(module, Int8Conv) for module in loaded.modules())
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["Bert", "ViT"])
def test_an_encoder_without_a_pooler(tmp_path, name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"image_size": 16, "patch_size": 4} if name == "ViT" else {"vocab_size": 16}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config, add_pooling_layer=False).eval()
    model = ipex.llm.optimize(model, quantization_config=get_weight_only_quant_qconfig_mapping())
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert loaded.pooler is None
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "ViT" else {"input_ids": torch.tensor([[3, 4, 5]])}
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("static", [True, False])
@torch.no_grad()
def test_attention_of_torchs(tmp_path, static):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
    model = transformers.SiglipVisionModel(config).eval().requires_grad_(False)
    names = model.state_dict().keys()
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**images).pooler_output
    mapping = get_weight_only_quant_qconfig_mapping().set_module_name_regex(".*k_proj", None)
    quantized = int8(model, images, default_static_qconfig_mapping) if static else convert(prepare(model, mapping))
    ipex.llm.save(quantized, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    head = next(module for module in loaded.modules() if isinstance(module, SplitMultiheadAttention))
    assert isinstance(head.q_proj, Int8Linear if static else WeightOnlyQuantizedLinear)
    assert isinstance(head.k_proj, Int8Linear if static else torch.nn.Linear)
    assert torch.equal(loaded(**images).pooler_output, quantized(**images).pooler_output)
    loaded.dequantize()
    assert loaded.state_dict().keys() == names
    torch.testing.assert_close(loaded(**images).pooler_output, expected, rtol=0.05, atol=0.05)


def test_recurrent_layers(tmp_path):
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "upsampling_ratios": [2, 2]}
    model = transformers.EncodecModel(transformers.EncodecConfig(**sizes)).eval().requires_grad_(False)
    audio = torch.randn(1, 1, 40)
    model = convert(prepare(model, default_dynamic_qconfig_mapping))
    expected = model.encoder(audio)
    ipex.llm.save(model, tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert sum(isinstance(module, Int8Recurrent) for module in loaded.modules()) == 2
    assert torch.equal(loaded.encoder(audio), expected)
    assert not loaded.hf_quantizer.is_trainable
    loaded.dequantize()
    assert not any(isinstance(module, Int8Recurrent) for module in loaded.modules())
    torch.testing.assert_close(loaded.encoder(audio), expected, rtol=1e-2, atol=1e-2)


def test_the_files_hold_plain_tensors(saved):
    tensors = load_file(saved / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.codes"].shape == (96, 32)
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.float32
    assert "lm_head.weight" not in tensors
    assert not any("_packed" in name for name in tensors)


@pytest.mark.parametrize(
    ("weight_dtype", "group_size"),
    [
        (WoqWeightDtype.INT2, 128),
        (WoqWeightDtype.INT3, 32),
        (WoqWeightDtype.INT4, 32),
        (WoqWeightDtype.INT6, -1),
        (WoqWeightDtype.NF4, 64),
    ],
)
def test_files_have_no_more_bytes_than_the_weights(llama, tmp_path, weight_dtype, group_size):
    model = optimized(llama, weight_dtype=weight_dtype, group_size=group_size)
    ipex.llm.save(model, tmp_path / "model")
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "model" / "model.safetensors").values()) <= model_bytes(
        model
    )


def with_scales(model, form):
    """The FP4 linears of `model` with scales that a saved model holds in the dtype `form`."""
    for module in model.modules():
        if isinstance(module, WeightOnlyQuantizedLinear):
            qw = module.quantized_weight()
            if form == torch.float16:
                qw = replace(qw, scales=qw.scales.half().float())
            elif form == torch.float8_e5m2:
                qw = replace(qw, scales=torch.exp2(qw.scales.log2().round()))
            else:
                supers = qw.scales.amax(1, keepdim=True) / 127
                factors = (qw.scales / supers).round().to(form).float()
                scheme = replace(qw.scheme, super_group_size=PER_CHANNEL)
                qw = replace(qw, scales=factors * supers, super_scales=supers, scheme=scheme)
            module._set_weight(qw)
    return model


@pytest.mark.parametrize("form", [torch.float16, torch.float8_e5m2, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("widened", [False, True])
def test_every_form_of_scales(llama, logits, tmp_path, monkeypatch, form, widened):
    model = with_scales(optimized(llama, weight_dtype=WoqWeightDtype.FP4, lowp_mode=WoqLowpMode.NONE), form)
    ipex.llm.save(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "scales" if form in (torch.float16, torch.float8_e5m2) else "scale_factors"
    assert tensors[f"lm_head.{name}"].dtype == form
    if widened:  # some releases of transformers do not ask for the dtype, and cast to the placeholder's
        monkeypatch.setattr(IpexQuantizer, "get_new_dtype", lambda self, converter, param, dtype: dtype)
    loaded = ipex.llm.load(tmp_path / "model")
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(tensor, loaded_state[name]) for name, tensor in state.items())
    assert torch.equal(logits(loaded), logits(model))


def test_zero_points_of_two_bytes_are_read_too(saved, logits):
    expected = logits(ipex.llm.load(saved))
    edit_tensors(saved, lambda t: t.update({k: v.short() for k, v in t.items() if k.endswith(".zero_points")}))
    assert torch.equal(logits(ipex.llm.load(saved)), expected)


def test_a_large_model_is_sharded(llama, logits, tmp_path, monkeypatch):
    monkeypatch.setattr("ipex_quant.llm.saving.MAX_SHARD_SIZE", "40KB")
    model = optimized(llama)
    ipex.llm.save(model, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(ipex.llm.load(tmp_path / "model")), logits(model))


def test_saving_again_replaces_the_model_and_keeps_other_files(llama, logits, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    model = optimized(llama)
    ipex.llm.save(model, directory)
    (directory / "README.md").write_text("mine")
    model.model.norm.weight.fill_(2)
    monkeypatch.setattr("ipex_quant.llm.saving.MAX_SHARD_SIZE", "40KB")
    ipex.llm.save(model, directory)
    assert not (directory / "model.safetensors").exists()
    assert (directory / "README.md").read_text() == "mine"
    assert torch.equal(logits(ipex.llm.load(directory)), logits(model))


def test_nothing_is_left_when_saving_fails(llama, tmp_path, monkeypatch):
    model = optimized(llama)

    def fail(folder, **options):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        ipex.llm.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_have_the_rights_that_the_umask_leaves(llama, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        ipex.llm.save(optimized(llama), tmp_path / "model")
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "model").iterdir()} == {
        file.name: oct(mode) for file in (tmp_path / "model").iterdir()
    }


def test_a_tokenizer_is_saved_with_it(llama, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    ipex.llm.save(optimized(llama), tmp_path / "model", Tokenizer())
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_the_device_map_may_name_the_cpu_only(saved):
    assert ipex.llm.load(saved).device.type == "cpu"
    assert transformers.AutoModelForCausalLM.from_pretrained(saved, device_map="cpu").device.type == "cpu"
    assert transformers.AutoModelForCausalLM.from_pretrained(saved, device_map="auto").device.type == "cpu"
    with pytest.raises(ValueError, match="run on the cpu"):
        transformers.AutoModelForCausalLM.from_pretrained(saved, device_map={"": "meta"})


def test_only_quantized_transformers_models_are_saved(llama, tmp_path):
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        ipex.llm.save(torch.nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"expected one that ipex_quant.llm.optimize or quantization.convert quantized"
    ):
        ipex.llm.save(llama, tmp_path / "model")


def test_other_directories_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match=r"expected a directory with a config\.json"):
        ipex.llm.load(tmp_path)
    llama.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"expected a quantized model; llm\.from_pretrained loads float models"):
        ipex.llm.load(tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        ipex.llm.load(tmp_path / "float")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=2), r"quantization_config\.version: expected 1, got 2"),
        (lambda q: q.pop("dtype"), r"quantization_config\.dtype: expected one of .*, got None"),
        (lambda q: q.update(modules=[]), r"quantization_config\.modules: expected names"),
        (lambda q: q["modules"].update(lm_head=None), "lm_head: expected .*, got None"),
        (lambda q: q["modules"].update({"model.nothing": q["modules"]["lm_head"]}), "no module 'model.nothing'"),
        (
            lambda q: q["modules"].update({"model.norm": q["modules"]["lm_head"]}),
            "model.norm: expected a linear layer, got a LlamaRMSNorm",
        ),
        (lambda q: q["modules"]["lm_head"].pop("bias"), "lm_head: expected "),
        (lambda q: q["modules"]["lm_head"].update(weight_dtype="int7"), r"expected one of \['int8'"),
        (lambda q: q["modules"]["lm_head"].update(act_quant_mode="none"), "lowp_mode int8 quantizes activations"),
        (lambda q: q["modules"]["lm_head"].update(group_size=3), "group_size: expected"),
        (lambda q: q["modules"]["lm_head"].update(symmetric=0), "lm_head: symmetric: expected true or false, got 0"),
        (lambda q: q["modules"]["lm_head"].update(act_order=True), r"lm_head: g_idx: missing in the checkpoint"),
    ],
)
def test_a_damaged_configuration_raises(saved, change, message):
    edit_config(saved, lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=message):
        ipex.llm.load(saved)


GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["modules"]["lm_head"].update(kind="int5"), r"lm_head: expected a kind of \['weight_only', 'int8'"),
        (lambda q: q["modules"]["lm_head"].update(kind=["int8"]), "lm_head: expected a kind of"),
        (lambda q: q["modules"]["lm_head"].update(kind="weight_only"), "lm_head: expected .*'act_order'"),
        (lambda q: q["modules"]["lm_head"].update(kind="int8_conv"), r"lm_head: expected \['bias', 'kind'\]"),
        (
            lambda q: q["modules"].update(lm_head={"kind": "int8_conv", "bias": False}),
            "lm_head: expected a convolution that can be quantized, got a Linear",
        ),
        (lambda q: q["modules"]["lm_head"].update(activation="dynamic"), r"lm_head: activation: expected one of"),
        (lambda q: q["modules"]["lm_head"].update(smoothed=1), "lm_head: smoothed: expected true or false, got 1"),
        (lambda q: q["modules"]["lm_head"].update(activation="per_token"), "lm_head: smoothed: expected false"),
        (lambda q: q["modules"]["lm_head"].update(bias=True), "lm_head: bias: missing in the checkpoint"),
        (lambda q: q["modules"][GATE].update(activation=["static"]), "share_groups: expected modules with the same"),
        (lambda q: q.update(share_groups=3), "share_groups: expected lists of names, got 3"),
        (lambda q: q.update(share_groups=["ab"]), "share_groups: expected lists of names"),
        (lambda q: q.update(share_groups=[[]]), "share_groups: expected modules with the same input"),
        (lambda q: q.update(share_groups=[["nothing"]]), "share_groups: expected names of INT8 linear layers"),
        (lambda q: q.update(share_groups=[[["lm_head"]]]), "share_groups: expected names of INT8 linear layers"),
        (lambda q: q["share_groups"].append([GATE]), "share_groups: expected each module once"),
        (lambda q: q.update(share_groups=[["lm_head", GATE]]), "share_groups: expected modules with the same input"),
        (
            lambda q: q.update(share_groups=[["lm_head", "model.layers.0.mlp.down_proj"]]),
            "lm_head, model.layers.0.mlp.down_proj: input_scale, .*: expected the same",
        ),
    ],
)
def test_a_damaged_description_of_int8_modules_raises(saved_int8, change, message):
    edit_config(saved_int8, lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=message):
        ipex.llm.load(saved_int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{GATE}.input_scale"), f"{GATE}: input_scale: missing in the checkpoint"),
        (lambda t: t[f"{GATE}.input_scale"].fill_(2), f"{GATE}, .*up_proj: input_scale, .*: expected the same"),
        (lambda t: t["lm_head.input_scale"].fill_(-1), "lm_head: scale: expected a finite number above 0"),
        (lambda t: t["lm_head.input_zero_point"].fill_(-1), r"lm_head: zero_point: expected 0\.\.255"),
        (lambda t: t["lm_head.smoothing_factor"].fill_(float("inf")), "lm_head: smoothing_factor: expected finite"),
        (lambda t: t.update({"lm_head.codes": t["lm_head.codes"].view(torch.uint8)}), "lm_head: codes: expected dtype"),
    ],
)
def test_damaged_int8_tensors_raise(saved_int8, change, message):
    edit_tensors(saved_int8, change)
    with pytest.raises((ValueError, TypeError), match=message):
        ipex.llm.load(saved_int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.codes"), "lm_head: codes: missing in the checkpoint"),
        (lambda t: t.pop("model.norm.weight"), r"missing_keys.*model\.norm\.weight"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"unexpected_keys.*model\.extra"),
        (lambda t: t.update({"lm_head.codes": t["lm_head.codes"].view(torch.int8)}), "lm_head: codes: expected dtype"),
        (lambda t: t["lm_head.scales"].fill_(float("nan")), "lm_head: scales: "),
    ],
)
def test_damaged_tensors_raise(saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises((ValueError, TypeError), match=message):
        ipex.llm.load(saved)


@pytest.mark.parametrize("name", ["lm_head.codes", "model.norm.weight"])
def test_tensors_of_another_shape_raise(saved, name):
    edit_tensors(saved, lambda t: t.update({name: t[name][:-1].contiguous()}))
    owner, _, key = name.rpartition(".")
    with pytest.raises(ValueError, match=rf"{owner}.*{key}.* shape|mismatched_keys.*{name}"):
        ipex.llm.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1 << 33}, r"model\.embed_tokens\.weight: expected shape \[8589934592, 64\], got \[96, 64\]"),
        ({"intermediate_size": 1 << 33}, r"mlp\.\w+_proj\.codes: expected shape \["),
    ],
)
def test_nothing_is_made_that_no_tensor_could_fill(saved, change, message):
    edit_config(saved, lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        ipex.llm.load(saved)
    edit_tensors(saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layernorm" not in name])
    with pytest.raises(ValueError, match="elements, of which the checkpoint has"):
        ipex.llm.load(saved)


def test_a_truncated_file_is_named(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"^{saved / 'model.safetensors'}: truncated or damaged"):
        ipex.llm.load(saved)


@pytest.mark.parametrize("name", ["NoSuchModel", "set_seed", "AutoModelForCausalLM", "LlamaConfig"])
def test_an_architecture_that_is_no_model_is_refused(saved, name):
    edit_config(saved, lambda config: config.update(architectures=[name]))
    with pytest.raises(ValueError, match=f"has no model {name}"):
        ipex.llm.load(saved)


@pytest.mark.parametrize("names", [[], None, "LlamaForCausalLM", [3]])
def test_architectures_that_are_no_names_are_refused(saved, names):
    edit_config(saved, lambda config: config.update(architectures=names))
    with pytest.raises(ValueError, match=r"architectures in config\.json: expected names of classes"):
        ipex.llm.load(saved)


def test_an_index_that_leads_out_of_the_directory_is_refused(saved):
    shutil.move(saved / "model.safetensors", saved.parent / "elsewhere.safetensors")
    names = load_file(saved.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected file names beside the index, got '\.\./elsewhere\.safetensors'"):
        ipex.llm.load(saved)


@pytest.mark.parametrize(
    "change", [{"hidden_act": ""}, {"num_hidden_layers": "2"}, {"num_attention_heads": 0}, {"tie_word_embeddings": []}]
)
def test_a_configuration_that_transformers_fails_with_is_a_value_error(saved, change):
    edit_config(saved, lambda config: config.update(change))
    with pytest.raises(ValueError, match="transformers cannot make a model of it"):
        ipex.llm.load(saved)


@pytest.mark.parametrize("text", ["[" * 100000, '{"a":' * 100000, "{", "\ufeff{}", "[]"])
def test_a_configuration_that_is_no_json_object_is_refused(saved, text):
    (saved / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: ") as raised:
        ipex.llm.load(saved)
    assert len(str(raised.value)) < 1000


def test_a_parameter_that_is_no_float_is_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bool()
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected a float dtype, got torch\.bool"):
        ipex.llm.load(saved)
