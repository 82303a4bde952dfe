import dataclasses
import math

import pytest
import torch
from transformers import AutoTokenizer

from ipex_quant import data, demo_encoders
from ipex_quant.nn import Int8Conv, Int8Linear

GOOD = demo_encoders.Row(
    label="W8A8 BERT",
    bytes=500,
    float_bytes=1000,
    error=0.01,
    layer_errors={f"layer{i}": 1e-7 for i in range(demo_encoders.LIMITS["W8A8 BERT"].layers)},
    float_layers=(),
    foreign_ops=(),
    reloads_bit_equal=True,
)


def failures(row):
    return [check.name for check in demo_encoders.checks(row) if not check.passed]


def test_good_measurements_pass():
    assert failures(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layer_errors": {}}, "0 layers compute in 8 bits, expected 14"),
        ({"float_layers": ("a", "b")}, "no layer stays in float: a, b"),
        ({"foreign_ops": ("aten::mm",)}, "no op of torch quantizes or multiplies by a weight: aten::mm"),
        ({"layer_errors": GOOD.layer_errors | {"layer3": 0.07}}, "every layer returns the sums of its codes: layer3"),
        ({"layer_errors": GOOD.layer_errors | {"layer3": math.nan}}, "every layer returns the sums of its codes: lay"),
        ({"bytes": 900}, "size is 0.90 of float32's"),
        ({"error": 0.2}, "relative error is 0.2000"),
        ({"error": math.nan}, "relative error is nan"),
        ({"reloads_bit_equal": False}, "saved and loaded again it is bit-equal"),
    ],
)
def test_each_defect_fails_its_own_check(changes, name):
    (failed,) = failures(dataclasses.replace(GOOD, **changes))
    assert failed.startswith(f"W8A8 BERT: {name}")


@pytest.fixture(scope="module")
def rows():
    tokenizer = AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    return {row.label: row for row in demo_encoders.measure_all(tokenizer)}


@pytest.mark.parametrize("label", demo_encoders.LIMITS)
def test_the_models_pass(rows, label):
    assert failures(rows[label]) == []
    assert label in demo_encoders.line(rows[label])


def test_the_random_numbers_of_the_caller_are_left_alone(rows):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    next(demo_encoders.measure_all(None))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", [Int8Conv, Int8Linear])
def test_a_kernel_that_is_wrong_is_found(monkeypatch, kind):
    """As one that adds pairs of products in 16 bits, where they saturate."""
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x).clamp(-0.5, 0.5))
    (failed,) = (name for name in failures(demo_encoders.vision_row()) if "the sums of its codes" in name)
    assert ("dwconv" in failed) == (kind is Int8Conv)


def test_a_layer_that_stayed_in_float_is_found(monkeypatch):
    from ipex_quant.quantization import get_smooth_quant_qconfig_mapping

    mapping = get_smooth_quant_qconfig_mapping().set_module_name("classifier", None)
    monkeypatch.setattr(demo_encoders, "default_static_qconfig_mapping", mapping)
    found = failures(demo_encoders.vision_row())
    assert any("no layer stays in float: " in name and "classifier" in name for name in found)
    assert any("multiplies by a weight: aten::addmm" in name or "aten::convolution" in name for name in found)
