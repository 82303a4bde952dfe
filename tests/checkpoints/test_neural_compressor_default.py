"""neural-compressor's layout "default": a qconfig.json of modules, and GPTQ's tensors in quantized_weight.pt."""

import json

import pytest
import torch

from ipex_quant.checkpoints import load_low_precision_checkpoint, open_checkpoint
from ipex_quant.checkpoints.neural_compressor_default import default_format
from ipex_quant.numerics.affine import dequantize

SETTINGS = {"dtype": "int4", "bits": 4, "group_size": 32, "group_dim": 1, "use_sym": False}


def config(name="model.layers.0.q", **changes):
    return {f"('{name}', 'Linear')": {"rtn": SETTINGS | changes}}


def test_a_directory(tmp_path, make_gptq_module):
    first, second = make_gptq_module(4, 16, 64, 32), make_gptq_module(8, 16, 64, 64, seed=1)
    parts = {"model.layers.0.q": first, "model.layers.10.q": second}
    state = {f"{name}.{key}": tensor for name, module in parts.items() for key, tensor in module.tensors.items()}
    state |= {f"{name}.scale_bf16_to_fp8": torch.ones(1) for name in parts} | {"norm.weight": torch.ones(4)}
    torch.save(state, tmp_path / "quantized_weight.pt")
    settings = config() | config("model.layers.10.q", bits=8, group_size=64, dtype="int8")
    (tmp_path / "qconfig.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(load_low_precision_checkpoint(tmp_path))
    for name, module in parts.items():
        assert torch.equal(dequantize(checkpoint[name][0]), module.weight)
    assert list(checkpoint.other_tensors()) == ["norm.weight"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "neural-compressor"}, r"expected settings of modules, got the entries \['quant_method'\]"),
        ({"('a', 'Linear')": 3}, "expected the settings of one algorithm, got 3"),
        ({"('a', 'Linear')": {"rtn": 3}}, "expected settings, got 3"),
        (config(dtype="fp8_e4m3"), "expected dtype 'int' or 'nf4' and group_dim 1, got 'fp8_e4m3', 1"),
        (config(group_dim=0), "group_dim 1, got 'int4', 0"),
        (config(bits=5), r"bits: expected one of \[2, 3, 4, 8\]"),
    ],
)
def test_settings_that_are_not_supported_are_named(settings, message, make_gptq_module):
    with pytest.raises(ValueError, match=message):
        default_format(settings).read("model.layers.0.q", make_gptq_module(4, 16, 64, 32).tensors, (16, 64))


def test_modules_left_in_float_are_not_read():
    with pytest.raises(ValueError, match="expected settings of modules"):
        default_format(config(dtype="fp32"))
