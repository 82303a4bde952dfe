import warnings

import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.numerics.affine import dequantize

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}


@pytest.fixture
def state_dict(make_gptq_module):
    module = make_gptq_module(4, 32, 64, 32)
    state = {f"model.q.{key}": tensor for key, tensor in module.tensors.items()}
    return state | {
        "model.q.bias": torch.arange(32).half(),
        "model.norm.weight": torch.ones(64),
        "lm_head.weight": torch.randn(8, 64),
        "lm_head.bias": torch.randn(8),
    }


@pytest.fixture
def weight(make_gptq_module):
    return make_gptq_module(4, 32, 64, 32).weight


def test_weight_and_bias_of_a_module(state_dict, weight):
    qw, bias = open_checkpoint((state_dict, GPTQ)).quantized_weight("model.q", in_features=64, out_features=32)
    assert torch.equal(dequantize(qw), weight)
    assert torch.equal(bias, torch.arange(32).half())


def test_bias_is_optional(state_dict):
    del state_dict["model.q.bias"]
    assert open_checkpoint((state_dict, GPTQ)).quantized_weight("model.q", 64, 32)[1] is None


def test_a_module_that_is_not_quantized_is_none(state_dict):
    checkpoint = open_checkpoint((state_dict, GPTQ))
    assert checkpoint.quantized_weight("lm_head", 64, 8) is None
    assert checkpoint.quantized_weight("model.k", 64, 8) is None


def test_a_module_that_dynamic_leaves_in_float_is_none(state_dict, weight):
    checkpoint = open_checkpoint((state_dict, GPTQ | {"dynamic": {"-:lm_head": {}}}))
    assert checkpoint.quantized_weight("lm_head", 64, 8) is None
    assert torch.equal(dequantize(checkpoint["model.q"][0]), weight)


def test_it_is_a_mapping_of_the_quantized_modules(state_dict, weight):
    checkpoint = open_checkpoint((state_dict, GPTQ))
    assert list(checkpoint) == ["model.q"]
    assert "lm_head" not in checkpoint
    assert torch.equal(dequantize(checkpoint["model.q"][0]), weight)


def test_weights_in_memory_are_a_checkpoint_too(state_dict, weight):
    qw = open_checkpoint((state_dict, GPTQ))["model.q"][0]
    checkpoint = open_checkpoint({"model.q": qw})
    assert dict(checkpoint) == {"model.q": (qw, None)}
    assert checkpoint.quantized_weight("model.q", in_features=64, out_features=32) == (qw, None)
    assert checkpoint.quantized_weight("model.k") is None
    assert (checkpoint.holds("model.q"), checkpoint.holds("model.k"), checkpoint.other_tensors()) == (True, False, {})
    with pytest.raises(ValueError, match=r"model.q: expected a weight of shape \[32, 65\], got \[32, 64\]"):
        checkpoint.quantized_weight("model.q", in_features=65, out_features=32)
    with pytest.raises(TypeError, match=r"model.k: expected a QuantizedWeight as the others are, got Tensor"):
        open_checkpoint({"model.q": qw, "model.k": weight})


def test_other_tensors_are_all_the_rest(state_dict):
    others = open_checkpoint((state_dict, GPTQ)).other_tensors()
    assert others.keys() == {"model.norm.weight", "lm_head.weight", "lm_head.bias"}


def test_errors_name_the_module(state_dict):
    checkpoint = open_checkpoint((state_dict, GPTQ))
    with pytest.raises(ValueError, match=r"^model.q.scales: expected shape \[groups, 16\], got \[2, 32\]"):
        checkpoint.quantized_weight("model.q", 64, 16)
    with pytest.raises(ValueError, match=r"^model.q.qweight: expected shape \[16, 32\], got \[8, 32\]"):
        checkpoint.quantized_weight("model.q", 128, 32)
    with pytest.raises(ValueError, match=r"^model.q.bias: expected floats of shape \[32\], got torch.float32 \[31\]"):
        open_checkpoint((state_dict | {"model.q.bias": torch.zeros(31)}, GPTQ))["model.q"]
    with pytest.raises(TypeError, match=r"^model.q.qweight: expected dtype torch.int32, got torch.int64"):
        open_checkpoint((state_dict | {"model.q.qweight": state_dict["model.q.qweight"].long()}, GPTQ))["model.q"]
    del state_dict["model.q.qweight"]
    with pytest.raises(ValueError, match=r"^model.q.qweight: missing"):
        checkpoint.quantized_weight("model.q", 64, 32)


@pytest.mark.parametrize("gone", [("qweight",), ("qweight", "g_idx"), ("qweight", "scales")])
def test_a_module_without_its_weight_raises(state_dict, make_gptq_module, gone):
    state_dict |= {f"model.k.{key}": tensor for key, tensor in make_gptq_module(4, 32, 64, 32).tensors.items()}
    for key in gone:
        del state_dict[f"model.k.{key}"]
    with pytest.raises(ValueError, match=r"^model.k.qweight: missing, .* only \[.*'qzeros'.*\] of this module; get"):
        open_checkpoint((state_dict, GPTQ))
    with (
        pytest.warns(UserWarning, match="has no config"),
        pytest.raises(ValueError, match=r"^model.k.qweight: missing"),
    ):
        open_checkpoint(state_dict)


def test_a_module_of_the_documents_form_without_its_weight_raises(make_gptq_module):
    state_dict = _document_form(make_gptq_module)[0]
    state_dict |= {name.replace("fc.", "fc2."): t for name, t in state_dict.items() if "packed_weight" not in name}
    with pytest.raises(ValueError, match=r"^fc2.packed_weight: missing, .* only \['packed_zp', 'scale'\]"):
        open_checkpoint(state_dict)


def test_the_scale_of_a_norm_is_no_quantized_module(make_gptq_module):
    checkpoint = open_checkpoint(_document_form(make_gptq_module)[0] | {"norm.scale": torch.ones(8)})
    assert list(checkpoint) == ["fc"]
    assert checkpoint.other_tensors().keys() == {"norm.scale"}


def test_a_bare_dict_is_taken_for_gptq_with_a_warning(state_dict, weight):
    with pytest.warns(UserWarning, match="has no config: taking it for GPTQ version 1"):
        checkpoint = open_checkpoint(state_dict)
    assert torch.equal(dequantize(checkpoint.quantized_weight("model.q", 64, 32)[0]), weight)


def _document_form(make_gptq_module, keys=("packed_weight", "scale", "packed_zp")):
    module = make_gptq_module(4, 16, 8, -1, v2=True)
    packed = [[sum(int(c) << 4 * i for i, c in enumerate(row))] for row in module.codes]
    packed = torch.tensor(packed).to(torch.int32)  # the low 32 bits
    tensors = (packed, module.tensors["scales"].t(), module.zero_points.int())
    return {f"fc.{key}": tensor for key, tensor in zip(keys, tensors, strict=True)}, module.weight


def test_the_documents_names_need_no_config(make_gptq_module):
    state_dict, weight = _document_form(make_gptq_module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = open_checkpoint(state_dict)
    assert torch.equal(dequantize(checkpoint.quantized_weight("fc", 8, 16)[0]), weight)


def test_names_by_key_config(make_gptq_module):
    state_dict, weight = _document_form(make_gptq_module, ("w", "s", "z"))
    state_dict["fc.b"] = torch.ones(16)
    keys = {"weight_key": "w", "scale_key": "s", "zero_point_key": "z", "bias_key": "b"}
    qw, bias = open_checkpoint((state_dict, keys)).quantized_weight("fc", 8, 16)
    assert torch.equal(dequantize(qw), weight)
    assert torch.equal(bias, torch.ones(16))
    assert open_checkpoint((state_dict, keys)).other_tensors() == {}


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        (7, TypeError, r"low_precision_checkpoint should be a state_dict or a tuple \(state_dict, config\), got int"),
        (({}, {}, {}), ValueError, "Invalid low_precision_checkpoint: .* got 3 elements"),
        (("a", {}), TypeError, "low_precision_checkpoint should be a state_dict, got str"),
        (({}, "gptq"), TypeError, "checkpoint config: should be a dict, got str"),
        ({"fc.qweight": [1]}, TypeError, "state_dict: expected tensors only, got list for 'fc.qweight'"),
        (
            ({}, {"quant_method": "foo"}),
            ValueError,
            r"quant_method: expected one of \['auto-round', 'awq', .*\], got 'foo'",
        ),
        (({}, {"quant_method": ["gptq"]}), ValueError, "quant_method: expected one of"),
        (({}, {"method": "gptq"}), ValueError, "checkpoint config: expected only keys of"),
        (({"fc.weight": torch.ones(2)}, GPTQ), ValueError, "no tensor is named '<module>.qweight'.*'fc.weight'"),
        (({"fc.qweight": torch.ones(2)}, {}), ValueError, "no tensor is named '<module>.packed_weight'"),
    ],
)
def test_invalid_arguments(checkpoint, error, message):
    with pytest.raises(error, match=message):
        open_checkpoint(checkpoint)
