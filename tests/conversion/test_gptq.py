import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from ipex_quant import llm
from ipex_quant.checkpoints import load_low_precision_checkpoint, open_checkpoint
from ipex_quant.conversion.calibration_batches import Samples, calibration_batches
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.nn.linears import weight_matrix
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.quantization import awq, get_weight_only_quant_qconfig_mapping, gptq
from ipex_quant.woq.gptq import GptqOptions
from ipex_quant.woq.gptq_blocks import quantize_blocks


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _dequantize_as_specified(tensors: dict, name: str, bits: int, v2: bool) -> torch.Tensor:
    """The weight [N, K] of one module, value by value from the description of the format."""
    qweight, qzeros = tensors[f"{name}.qweight"].tolist(), tensors[f"{name}.qzeros"].tolist()
    scales, g_idx = tensors[f"{name}.scales"].tolist(), tensors[f"{name}.g_idx"].tolist()
    per_word, mask = 32 // bits, (1 << bits) - 1
    weight = torch.empty(len(scales[0]), len(g_idx))
    for k, group in enumerate(g_idx):
        for n in range(len(scales[0])):
            code = qweight[k // per_word][n] >> bits * (k % per_word) & mask
            zero = qzeros[group][n // per_word] >> bits * (n % per_word) & mask
            weight[n, k] = scales[group][n] * (code - zero - (0 if v2 else 1))
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_the_directory_holds_exactly_what_was_quantized(model, samples, tmp_path, sym, act_order, bits):
    directory = gptq(
        model, samples, group_size=16, wbits=bits, sym=sym, act_order=act_order, save_dir=tmp_path / "out" / "deep"
    )
    assert directory == tmp_path / "out" / "deep"
    scheme = WeightScheme(WoqWeightDtype.INT8 if bits == 8 else WoqWeightDtype.INT4, sym, 16)
    options = GptqOptions(act_order=act_order, static_groups=False, scale_dtype=torch.float16)
    expected = quantize_blocks(model, [{"input_ids": ids} for ids in samples], scheme, options)

    checkpoint = open_checkpoint(load_low_precision_checkpoint(directory))
    tensors = load_file(directory / "model.safetensors")
    v2 = json.loads((directory / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert v2 == any(
        qw.zero_points is not None and qw.zero_points.min() == (0 if bits == 4 else -128) for qw in expected.values()
    )
    assert set(checkpoint) == set(expected)
    for name, qw in expected.items():
        out_features, in_features = qw.shape
        found, bias = checkpoint.quantized_weight(name, in_features, out_features)
        assert bias is None
        assert (found.g_idx is None) == (qw.g_idx is None)
        assert torch.equal(found.codes, qw.codes)
        assert torch.equal(dequantize(found), dequantize(qw))
        specified = _dequantize_as_specified(tensors, name, bits, v2=v2)
        torch.testing.assert_close(specified, dequantize(qw), rtol=1e-6, atol=0)


def test_everything_else_is_the_float_model(model, samples, tmp_path):
    directory = gptq(model, samples, group_size=16, save_dir=tmp_path / "out")
    others = open_checkpoint(load_low_precision_checkpoint(directory)).other_tensors()
    state = model.state_dict()
    linears = {f"{name}.weight" for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    assert others.keys() == {n for n in state if n.removeprefix("model.layers.") not in linears} - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in others.items())


def test_configuration_files(model, samples, tmp_path):
    directory = gptq(model, samples, group_size=-1, wbits=8, sym=True, percdamp=0.05, save_dir=tmp_path / "out")
    assert {file.name for file in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantize_config.json",
    }
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = json.loads((directory / "quantize_config.json").read_text())
    assert config["quantization_config"] == quantization
    expected = {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": -1,
        "sym": True,
        "desc_act": False,
        "damp_percent": 0.05,
    }
    assert quantization.items() >= (expected | {"checkpoint_format": "gptq", "lm_head": False}).items()
    assert not hasattr(model.config, "quantization_config")


def test_static_groups_need_no_order_in_the_file(model, samples, tmp_path):
    directory = gptq(
        model, samples, group_size=16, act_order=True, static_groups=True, clip_steps=3, save_dir=tmp_path / "out"
    )
    state_dict, config = load_low_precision_checkpoint(directory)
    assert config["desc_act"] is False
    options = GptqOptions(act_order=True, static_groups=True, clip_steps=3, scale_dtype=torch.float16)
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 16)
    expected = quantize_blocks(model, [{"input_ids": ids} for ids in samples], scheme, options)
    checkpoint = open_checkpoint((state_dict, config))
    for name, qw in expected.items():
        found = checkpoint[name][0]
        assert found.g_idx is None
        assert torch.equal(dequantize(found), dequantize(qw))


def test_zero_points_of_0_are_written_in_version_2(model, samples, tmp_path):
    # A row of zeros has zero point 0, which version 1 could not hold.
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[3] = 0
    directory = gptq(model, samples, group_size=16, save_dir=tmp_path / "out")
    state_dict, config = load_low_precision_checkpoint(directory)
    assert config["checkpoint_format"] == "gptq_v2"
    weight = dequantize(open_checkpoint((state_dict, config))["model.layers.0.self_attn.o_proj"][0])
    assert not weight[3].any()
    assert weight[2].any()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_dtype(model, samples, tmp_path, scale_dtype):
    directory = gptq(model, samples, group_size=16, scale_dtype=scale_dtype, save_dir=tmp_path / "out")
    state_dict, _ = load_low_precision_checkpoint(directory)
    assert {t.dtype for name, t in state_dict.items() if name.endswith(".scales")} == {scale_dtype}


def _gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    return OPTForCausalLM(
        OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, max_position_embeddings=32)
    )


@pytest.mark.parametrize("make", [_gpt2, _opt])
def test_other_architectures(make, samples, tmp_path):
    torch.manual_seed(0)
    model = make()
    checkpoint = open_checkpoint(
        load_low_precision_checkpoint(gptq(model, samples, wbits=8, sym=True, save_dir=tmp_path / "out"))
    )
    assert len(checkpoint) == (8 if make is _gpt2 else 12)
    for name in checkpoint:
        linear = model.get_submodule(name)
        out_features, in_features = weight_matrix(linear).shape
        qw, bias = checkpoint.quantized_weight(name, in_features, out_features)
        torch.testing.assert_close(dequantize(qw), weight_matrix(linear), rtol=0.05, atol=0.005)
        assert torch.equal(bias, linear.bias)


def test_model_without_a_configuration(samples, tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, hidden):
            return hidden + self.fc(hidden)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(64, 32), nn.ModuleList([Block(), Block()])

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    state_dict, config = load_low_precision_checkpoint(gptq(Plain(), samples, 16, save_dir=tmp_path / "out"))
    assert set(open_checkpoint((state_dict, config))) == {"blocks.0.fc", "blocks.1.fc"}


def test_the_model_is_not_changed(model, samples, tmp_path):
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gptq(model, samples, group_size=16, save_dir=tmp_path / "out")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_an_existing_directory_is_never_overwritten(model, samples, tmp_path):
    (tmp_path / "out").mkdir()
    gptq(model, samples, group_size=16, save_dir=tmp_path / "out")  # empty is fine
    with pytest.raises(ValueError, match=r"save_dir: .*out exists and is not empty"):
        gptq(model, samples, group_size=16, save_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        gptq(model, samples, group_size=16, save_dir=tmp_path / "out" / "config.json")


def test_a_failure_leaves_nothing_behind(model, samples, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(model.config), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        gptq(model, samples, group_size=16, save_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wbits": 5}, r"wbits: expected one of \[2, 3, 4, 8\], got 5"),
        ({"group_size": 24}, "group_size: expected -1"),
        ({"percdamp": -1}, "percdamp: expected 0 to 10"),
        ({"compression_dtype": torch.int8}, r"compression_dtype: GPTQ files hold torch\.int32 words, got torch\.int8"),
        ({"compression_dim": 0}, "compression_dim: .* expected 1, got 0"),
        ({"scale_dtype": torch.float64}, r"scale_dtype: expected one of .* got torch\.float64"),
        ({"nsamples": 0}, "nsamples and pad_max_length: expected at least 1, got 0 and 2048"),
        ({"use_max_length": True}, "dataloader: expected at least one sample of at least pad_max_length=2048 tokens"),
        ({"dataloader": []}, "dataloader: expected at least one sample, got none"),
    ],
)
def test_bad_arguments(model, samples, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        gptq(**{"model": model, "dataloader": samples, "save_dir": tmp_path / "out"} | arguments)
    assert list(tmp_path.iterdir()) == []


class Plain(nn.Module):
    """A model whose main input is `main_input_name`, as transformers' models say it."""

    def __init__(self, main_input_name="input_ids"):
        super().__init__()
        self.main_input_name = main_input_name

    def forward(self, input_ids=None, **kwargs):
        raise AssertionError("nobody calls it")


PLAIN = Plain()
IDS = torch.arange(12).view(2, 6)
VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
)


@pytest.mark.parametrize(
    "item",
    [
        IDS,
        {"input_ids": IDS},
        {"input_ids": IDS, "labels": IDS},
        BatchEncoding({"input_ids": IDS}),
        (IDS, torch.tensor([5, 5])),
        ({"input_ids": IDS}, torch.tensor([5, 5])),
        ((IDS, torch.ones(2, 6)), torch.tensor([5, 5])),
        {"input_ids": IDS.tolist()},
    ],
)
def test_what_a_dataloader_may_yield(item):
    (batch,) = calibration_batches(PLAIN, [item], Samples())
    assert batch.keys() == {"input_ids"}
    assert torch.equal(batch["input_ids"], IDS)


def test_a_single_sequence_becomes_a_batch():
    (batch,) = calibration_batches(PLAIN, [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]}], Samples())
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0]]


def test_samples_are_counted_and_cut():
    mask, embeds = torch.ones(2, 6), torch.zeros(2, 6, 3)
    item = {"input_ids": IDS, "attention_mask": mask, "inputs_embeds": embeds, "position_ids": IDS.expand(3, 2, 6)}
    batches = calibration_batches(PLAIN, [item, item, item], Samples(3, 4))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[0, 1, 2, 3], [6, 7, 8, 9]], [[0, 1, 2, 3]]]
    assert [list(batch["attention_mask"].shape) for batch in batches] == [[2, 4], [1, 4]]
    assert [batch["inputs_embeds"].shape for batch in batches] == [(2, 4, 3), (1, 4, 3)]


def test_tokens_that_stand_for_features_are_not_cut_off():
    pixels, patches = torch.zeros(2, 6, 5), torch.zeros(7, 5)
    (first, second) = calibration_batches(PLAIN, [{"input_ids": IDS, "pixel_values": pixels}] * 3, Samples(3, 4))
    assert (first["input_ids"].shape, first["pixel_values"].shape) == ((2, 6), (2, 6, 5))
    assert (second["input_ids"].shape, second["pixel_values"].shape) == ((1, 6), (1, 6, 5))
    # nobody knows which of the seven patches are the first sequence's
    (whole,) = calibration_batches(PLAIN, [{"input_ids": IDS, "pixel_values": patches}] * 3, Samples(1, 4))
    assert (whole["input_ids"].shape, whole["pixel_values"].shape) == ((2, 6), (7, 5))


@pytest.mark.parametrize("name", ["inputs_embeds", "pixel_values", "input_features", "input_values"])
def test_models_that_take_no_tokens(name):
    features = torch.randn(2, 6, 3)
    batch = {name: features, "interpolate_pos_encoding": True, "mask": None}
    (found,) = calibration_batches(PLAIN, [batch], Samples())
    assert found == batch
    (found,) = calibration_batches(Plain(name), [features, features], Samples(2))
    assert list(found) == [name]
    (found,) = calibration_batches(PLAIN, [{name: features.numpy()}], Samples(1))
    assert torch.equal(found[name], features[:1])


def test_a_decoders_tokens_are_cut_too():
    item = {"input_ids": IDS, "decoder_input_ids": torch.zeros(2, 5), "decoder_attention_mask": torch.ones(2, 5)}
    (batch,) = calibration_batches(PLAIN, [item], Samples(2, 4))
    assert [tuple(tensor.shape) for tensor in batch.values()] == [(2, 4)] * 3


def test_use_max_length_skips_shorter_samples():
    batches = calibration_batches(PLAIN, [IDS[:, :3], IDS, IDS[:, :5]], Samples(128, 5, only_full=True))
    assert [batch["input_ids"].shape[1] for batch in batches] == [5, 5]


@pytest.mark.parametrize("item", [{"inputs": IDS}, "text", 3, (), {}, {"input_features": [[1.0], [1.0, 2.0]]}])
def test_items_that_are_no_samples(item):
    with pytest.raises(TypeError, match=r"dataloader: .*expected (a tensor|a mapping|items that are a mapping)"):
        calibration_batches(PLAIN, [item], Samples())
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, T\] or \[T\], got \[1, 2, 6\]"):
        calibration_batches(PLAIN, [IDS[None]], Samples())


def test_a_weight_that_is_not_finite_is_named(model, samples, tmp_path):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: weight: expected finite values"):
        gptq(model, samples, save_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_scales_that_the_dtype_cannot_hold_are_found_before_the_work(model, samples, tmp_path, place):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    linear = model.get_submodule(place)
    linear.weight = nn.Parameter(torch.full_like(linear.weight, 1e7))
    with pytest.raises(ValueError, match=rf"^{re.escape(place)}: scales: not representable in torch\.float16"):
        gptq(model, samples, group_size=16, sym=True, save_dir=tmp_path / "out", lm_head=place == "lm_head")
    assert not calls
    gptq(model, samples, group_size=16, sym=True, save_dir=tmp_path / "wide", scale_dtype=torch.float32)


def test_the_head_is_quantized_by_choice(model, samples, tmp_path):
    model.eval()
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=16)
    for lm_head in (False, True):
        directory = gptq(model, samples, group_size=16, save_dir=tmp_path / str(lm_head), lm_head=lm_head)
        assert json.loads((directory / "quantize_config.json").read_text())["lm_head"] is lm_head
        checkpoint = load_low_precision_checkpoint(directory)
        assert ("lm_head.qweight" in checkpoint[0]) is lm_head
        quantized = llm.optimize(model, quantization_config=mapping, low_precision_checkpoint=checkpoint)
        assert isinstance(quantized.lm_head, WeightOnlyQuantizedLinear) is lm_head
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_head_that_there_is_not(samples, tmp_path):
    model = ViTForImageClassification(VIT)
    with pytest.raises(ValueError, match="lm_head: ViTForImageClassification has no output head"):
        gptq(model, [torch.zeros(1, 3, 16, 16)], save_dir=tmp_path / "out", lm_head=True)


def test_linears_that_stay_in_float_are_named(tmp_path):
    model = ViTForImageClassification(VIT)
    with pytest.warns(UserWarning, match=r"^gptq: these linear layers stay in float: classifier$"):
        gptq(model, [torch.randn(2, 3, 16, 16)], group_size=16, save_dir=tmp_path / "out")


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_models_called_with_features(tmp_path, algorithm):
    """Both come closer than rounding to nearest, for the batches that they saw."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.3,
    )
    model = WhisperForConditionalGeneration(config).eval()
    batch = {"input_features": torch.randn(4, 8, 32), "decoder_input_ids": torch.randint(3, 64, (4, 12))}
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=16)
    nearest = llm.optimize(model, quantization_config=mapping)
    if algorithm == "awq":
        result = awq(model, [batch], mapping, lm_head=True)
    else:
        directory = gptq(model, [batch], group_size=16, save_dir=tmp_path / "out", lm_head=True)
        checkpoint = load_low_precision_checkpoint(directory)
        result = llm.optimize(model, quantization_config=mapping, low_precision_checkpoint=checkpoint)
    with torch.no_grad():
        errors = [float((each(**batch).logits - model(**batch).logits).norm()) for each in (result, nearest)]
    assert errors[0] < {"gptq": 0.9, "awq": 1}[algorithm] * errors[1]
