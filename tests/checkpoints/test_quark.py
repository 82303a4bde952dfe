"""Quark's modules, with values computed one by one."""

import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.checkpoints.quark import QuarkFormat
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.codebooks import E2M1_DOUBLED

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def config(dtype="uint4", scheme="per_group", group_size=32, **changes):
    weight = {"dtype": dtype, "qscheme": scheme, "group_size": group_size}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": None},
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
        **changes,
    }


def words(rows, order=ORDER):
    """Eight fields of 4 bits in each word, field by field."""
    packed = []
    for row in rows:
        own = [0] * (len(row) // 8)
        for column, value in enumerate(row):
            own[column // 8] |= (value & 15) << 4 * order.index(column % 8)
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in own])
    return torch.tensor(packed, dtype=torch.int32)


def integers(dtype, scheme, rows=16, columns=64, group=32, order=ORDER, old=False):
    generator = torch.Generator().manual_seed(0)
    bits, signed = int(dtype[-1]), dtype.startswith("int")
    low = -(1 << bits - 1) if signed else 0
    groups = columns // group if scheme == "per_group" else 1
    codes = torch.randint(low, low + (1 << bits), (rows, columns), generator=generator)
    zeros = torch.randint(low, low + (1 << bits), (rows, groups), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5).half()
    index = torch.arange(columns) // (group if scheme == "per_group" else columns)
    weight = (codes - zeros[:, index]) * scales.float()[:, index]
    stored, points = (codes.t(), zeros.t()) if scheme == "per_group" else (codes, zeros.t())
    if bits == 4:
        stored, points = words(stored.tolist(), order), words(points.tolist(), order)
    else:
        stored, points = (each.to(torch.int8 if signed else torch.uint8).contiguous() for each in (stored, points))
    scales = scales.flatten() if scheme == "per_channel" else (scales if old else scales.t().contiguous())
    points = points.flatten() if scheme == "per_channel" else points
    return {"weight": stored, "weight_scale": scales, "weight_zero_point": points}, weight


@pytest.mark.parametrize("scheme", ["per_group", "per_channel"])
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
def test_integers(dtype, scheme):
    tensors, weight = integers(dtype, scheme)
    qw = QuarkFormat.from_config(config(dtype, scheme)).read("m", tensors, (16, 64))
    assert torch.equal(dequantize(qw), weight)


def test_scales_of_old_files_and_codes_in_order():
    tensors, weight = integers("uint4", "per_group", order=tuple(range(8)), old=True)
    form = QuarkFormat.from_config(config(export={"pack_method": "order"}))
    assert torch.equal(dequantize(form.read("m", tensors, (16, 64))), weight)


def test_symmetric_without_zero_points():
    tensors, _ = integers("int4", "per_group")
    del tensors["weight_zero_point"]
    assert QuarkFormat.from_config(config("int4")).read("m", tensors, (16, 64)).scheme.symmetric


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
def test_fp8(scheme):
    weight = torch.randn(6, 32).to(torch.float8_e4m3fn)
    scales = torch.tensor(0.25) if scheme == "per_tensor" else torch.rand(6) + 0.5
    qw = QuarkFormat.from_config(config("fp8_e4m3", scheme)).read(
        "m", {"weight": weight, "weight_scale": scales}, (6, 32)
    )
    assert torch.equal(dequantize(qw), weight.float() * scales.reshape(-1, 1))


def test_fp4():
    packed = torch.randint(0, 256, (4, 32), dtype=torch.uint8)
    exponents = torch.randint(120, 130, (4, 2), dtype=torch.uint8)
    qw = QuarkFormat.from_config(config("fp4")).read("m", {"weight": packed, "weight_scale": exponents}, (4, 64))
    for row in range(4):
        for column in range(64):
            code = int(packed[row, column // 2]) >> 4 * (column % 2) & 15
            value = E2M1_DOUBLED[code].item() / 2 * 2.0 ** (int(exponents[row, column // 32]) - 127)
            assert dequantize(qw)[row, column] == value


def test_patterns_of_names_have_their_own_arguments():
    own = config("fp8_e4m3", "per_tensor")["global_quant_config"]
    form = QuarkFormat.from_config(config(layer_quant_config={"*.q_proj": own, "*.o_proj": {"weight": None}}))
    weight = {"weight": torch.zeros(4, 32).to(torch.float8_e4m3fn), "weight_scale": torch.tensor([2.0])}
    assert form.read("a.q_proj", weight, (4, 32)).scheme.dtype.name == "FP8"
    with pytest.raises(ValueError, match="leaves the module in float"):
        form.read("a.o_proj", weight, (4, 32))


def test_float_weights_stay():
    tensors, _ = integers("uint4", "per_group")
    state = {f"a.{name}": tensor for name, tensor in tensors.items()} | {"b.weight": torch.zeros(4, 4)}
    checkpoint = open_checkpoint((state, config()))
    assert list(checkpoint) == ["a"]
    assert list(checkpoint.other_tensors()) == ["b.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"export": {"pack_method": "x"}}, r"export\.pack_method: expected 'reorder' or 'order', got 'x'"),
        ({"export": {"weight_format": "fake_quantized"}}, r"export\.weight_format: expected 'real_quantized'"),
        ({"layer_quant_config": [][:1] or [1]}, "layer_quant_config: expected patterns of names"),
        ({"layer_quant_config": {"a": 1}}, "layer_quant_config: 'a': expected how modules are quantized, got 1"),
        ({"global_quant_config": {"weight": [{}, {}]}}, "weight: expected one way to quantize"),
        ({"global_quant_config": {"weight": {"dtype": "mx6", "qscheme": "per_group"}}}, r"weight\.dtype: .*got 'mx6'"),
        (
            {"global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_block"}}},
            r"weight\.qscheme: .*got 'per_block'",
        ),
        (
            {"global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group"}}},
            r"weight\.group_size: expected a size, got None",
        ),
    ],
)
def test_options_that_are_not_supported_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        QuarkFormat.from_config(config(**change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("weight"), ValueError, "weight: missing"),
        (lambda t: t.update(weight=t["weight"][1:]), ValueError, r"weight: expected shape \[16, 64\], got \[16, 63\]"),
        (lambda t: t.update(weight=t["weight"].long()), TypeError, r"weight: expected dtype torch\.int32"),
        (lambda t: t.update(weight_scale=t["weight_scale"][1:]), ValueError, "weight_scale: expected shape"),
        (
            lambda t: t.update(weight_zero_point=t["weight_zero_point"][:, 1:]),
            ValueError,
            r"weight_zero_point: expected shape \[2, 16\], got \[2, 8\]",
        ),
        (lambda t: t.update(weight=t["weight"][:, :0]), ValueError, "weight: expected rows and columns"),
    ],
)
def test_inconsistent_tensors_are_refused(change, error, message):
    tensors, _ = integers("uint4", "per_group")
    change(tensors)
    with pytest.raises(error, match=message):
        QuarkFormat.from_config(config()).read("m", tensors, (16, 64))


@pytest.mark.parametrize("zeros", [torch.zeros(0, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.uint8)])
def test_zero_points_of_another_number_of_rows_are_refused(zeros):
    tensors, _ = integers("uint8", "per_channel")
    with pytest.raises(ValueError, match=r"weight_zero_point: expected shape \[1, 16\]"):
        QuarkFormat.from_config(config("uint8", "per_channel")).read(
            "m", tensors | {"weight_zero_point": zeros}, (16, 64)
        )
