import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.checkpoints.auto_round import PACKINGS, AutoRoundFormat
from ipex_quant.numerics.affine import dequantize

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def config(**options):
    return {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int", **options}


def awq_tensors(module):
    """A module of `make_gptq_module` (4 bits) in AWQ's layout."""

    def packed(fields):
        words = (fields.long().unflatten(1, (-1, 8))[..., torch.tensor(ORDER)] << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    tensors = {"qweight": packed(module.codes.t()), "qzeros": packed(module.zero_points.t())}
    return tensors | {"scales": module.tensors["scales"]}


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_packing_is_its_layout(packing, make_gptq_module):
    module = make_gptq_module(4, 32, 64, 32, v2=packing != "auto_round:auto_gptq")
    tensors = awq_tensors(module) if packing.endswith("awq") else module.tensors
    qw = AutoRoundFormat.from_config(config(packing_format=packing)).read("m", tensors, (32, 64))
    assert torch.equal(dequantize(qw), module.weight)


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_modules_may_have_other_bits(method, make_gptq_module):
    modules = {"a.q": (4, 32), "a.head": (8, 64), "b.up": (2, 16)}
    made = {name: make_gptq_module(bits, 32, 64, size) for name, (bits, size) in modules.items()}
    state = {f"{name}.{key}": tensor for name, module in made.items() for key, tensor in module.tensors.items()}
    extra = {"a.head": {"bits": 8, "group_size": 64}, r".*\.up": {"bits": 2, "group_size": 16, "data_type": "int"}}
    extra["a.gate"] = {"bits": 16, "data_type": "float"}
    checkpoint = open_checkpoint((state, config(extra_config=extra, quant_method=method)))
    for name, module in made.items():
        assert torch.equal(dequantize(checkpoint[name][0]), module.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing_format": "auto_round:exllama"}, "packing_format: expected one of"),
        ({"packing_format": 3}, "packing_format: expected one of"),
        ({"data_type": "mx_int"}, r"data_type, bits: expected 'int' or one of .*got \('mx_int', 4\)"),
        ({"data_type": "mx_fp", "extra_config": {"m": {"bits": 8}}}, "extra_config: expected 4 bits for all modules"),
        ({"extra_config": {"m": 3}}, "extra_config: expected settings of 'm', got 3"),
        ({"extra_config": {"(": {}}}, "is not a regular expression"),
        ({"extra_config": [1]}, "extra_config: expected names"),
    ],
)
def test_configurations_that_are_not_supported(options, message):
    with pytest.raises(ValueError, match=message):
        AutoRoundFormat.from_config(config(**options))


def test_bits_that_do_not_exist(make_gptq_module):
    tensors = make_gptq_module(4, 32, 64, 32).tensors
    for packing, message in (("auto_round:auto_awq", "bits: expected 4"), ("auto_round", "bits: expected one of")):
        form = AutoRoundFormat.from_config(config(packing_format=packing, extra_config={"m": {"bits": 5}}))
        with pytest.raises(ValueError, match=message):
            form.read("m", tensors, (32, 64))


def test_floats_have_the_tensors_of_compressed_tensors():
    codes, exponents = torch.randint(0, 16, (6, 64)), torch.randint(120, 130, (6, 2), dtype=torch.uint8)
    tensors = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), "weight_scale": exponents}
    read = AutoRoundFormat.from_config(config(data_type="mx_fp", extra_config={"head": {"bits": 16}})).read
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = levels[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(dequantize(read("m", tensors, (6, 64))), expected)
    weight = torch.randn(6, 64).to(torch.float8_e4m3fn)
    for scales in (torch.rand(6) + 0.1, torch.rand(1) + 0.1):
        read = AutoRoundFormat.from_config(config(data_type="fp", bits=8)).read
        qw = read("m", {"weight": weight, "weight_scale": scales}, (6, 64))
        assert torch.equal(dequantize(qw), weight.float() * scales.reshape(-1, 1))


def test_a_module_of_another_type_is_refused(make_gptq_module):
    form = AutoRoundFormat.from_config(config(extra_config={"m": {"bits": 4, "data_type": "mx_fp"}}))
    with pytest.raises(ValueError, match="extra_config: data_type: expected 'int'"):
        form.read("m", make_gptq_module(4, 32, 64, 32).tensors, (32, 64))
