"""What writers store, decoded value by value from the descriptions of the formats, and what they refuse."""

import dataclasses
import re

import pytest
import torch

from ipex_quant.checkpoints import Int8Input
from ipex_quant.checkpoints.gguf_blocks import read_blocks
from ipex_quant.checkpoints.registry import format_from_config
from ipex_quant.checkpoints.writers import WRITERS, Layer, LayerError
from ipex_quant.checkpoints.writers.compressed_tensors import PACKED
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

ROWS, COLUMNS, GROUP = 16, 64, 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def make_weight(dtype=WoqWeightDtype.INT4, symmetric=False, group_size=GROUP, act_order=False, seed=0):
    """A random weight whose scales are float16; zero points are 1 and more."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, COLUMNS, generator=generator) + torch.linspace(-0.5, 0.5, ROWS)[:, None]
    weight = affine.quantize(values, WeightScheme(dtype, symmetric, group_size))
    scales = weight.scales.half().float()
    zero_points = weight.zero_points
    if zero_points is not None and dtype != WoqWeightDtype.INT8:
        zero_points = zero_points.clamp(1, (1 << dtype.bits) - 1)
    g_idx = (torch.randperm(COLUMNS, generator=generator) // group_size).int() if act_order else None
    return dataclasses.replace(weight, scales=scales, zero_points=zero_points, g_idx=g_idx)


def write(form, weights, in_float=(), head=None, inputs=None):
    layers = [Layer(name, lambda weight=weight: weight, (inputs or {}).get(name)) for name, weight in weights.items()]
    writer = WRITERS[form](layers, list(in_float), head)
    return writer, {layer.name: writer.tensors(layer) for layer in layers}


def field(words, index, bits):
    """Field `index` of a stream of bits in a list of int32 words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
    return stream >> (bits * index) & ((1 << bits) - 1)


def gptq_values(tensors, bits, add):
    g_idx = tensors["g_idx"].tolist()
    return torch.tensor(
        [
            [
                float(tensors["scales"][g_idx[k], n])
                * (field(tensors["qweight"][:, n], k, bits) - field(tensors["qzeros"][g_idx[k]], n, bits) - add)
                for k in range(COLUMNS)
            ]
            for n in range(ROWS)
        ]
    )


def awq_values(tensors):
    def at(words, n):
        return field([words[n // 8]], AWQ_ORDER.index(n % 8), 4)

    return torch.tensor(
        [
            [
                float(tensors["scales"][k // GROUP, n])
                * (at(tensors["qweight"][k], n) - at(tensors["qzeros"][k // GROUP], n))
                for k in range(COLUMNS)
            ]
            for n in range(ROWS)
        ]
    )


def per_row(weight):
    return {name: tensor for name, tensor in weight.tensors().items() if name != "g_idx"}


def packed_values(tensors, bits):
    half = 1 << (bits - 1)
    groups = tensors["weight_scale"].shape[1]
    g_idx = tensors.get("weight_g_idx", torch.arange(COLUMNS) // (COLUMNS // groups)).tolist()

    def zero(n, g):
        return field(tensors["weight_zero_point"][:, g], n, bits) if "weight_zero_point" in tensors else half

    return torch.tensor(
        [
            [
                float(tensors["weight_scale"][n, g_idx[k]])
                * (field(tensors["weight_packed"][n], k, bits) - zero(n, g_idx[k]))
                for k in range(COLUMNS)
            ]
            for n in range(len(tensors["weight_scale"]))
        ]
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT2, WoqWeightDtype.INT3, WoqWeightDtype.INT4, WoqWeightDtype.INT8])
def test_gptq(dtype, symmetric, act_order):
    weight = make_weight(dtype, symmetric, act_order=act_order)
    writer, stored = write("gptq", {"a.b": weight})
    bits = dtype.bits
    config = writer.config
    back = format_from_config(config).read("a.b", stored["a.b"], weight.shape)
    assert back.scheme == weight.scheme
    assert (config["bits"], config["group_size"], config["desc_act"]) == (bits, GROUP, act_order)
    assert (config["checkpoint_format"], config["sym"], config["dynamic"]) == ("gptq", symmetric, {})
    assert stored["a.b"]["scales"].dtype == torch.float16
    assert torch.equal(gptq_values(stored["a.b"], bits, 1), affine.dequantize(weight, torch.float32))


def test_gptq_is_version_2_where_a_zero_point_is_0():
    weight = make_weight()
    weight.zero_points[3, 1] = 0
    writer, stored = write("gptq", {"a.b": weight, "a.c": make_weight(symmetric=True)})
    assert writer.config["checkpoint_format"] == "gptq_v2"
    for name, each in (("a.b", weight), ("a.c", make_weight(symmetric=True))):
        assert torch.equal(gptq_values(stored[name], 4, 0), affine.dequantize(each, torch.float32))


def test_gptq_needs_one_version_for_all_layers():
    low, high = make_weight(), make_weight(seed=1)
    low.zero_points[0, 0], high.zero_points[0, 0] = 0, 16
    write("gptq", {"high": high})
    with pytest.raises(
        LayerError, match=r"high: a zero point of 16 needs GPTQ version 1, and one of 0 in low version 2"
    ):
        write("gptq", {"low": low, "high": high})


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_stores_narrow_codes_narrowly(bits):
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), dtype=torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    zero_points = torch.randint(1, 1 << bits, (ROWS, 2), dtype=torch.int16)
    scheme = WeightScheme(WoqWeightDtype.INT4, False, GROUP)
    weight = QuantizedWeight(packed, torch.rand(ROWS, 2).half().float(), zero_points, None, scheme, (ROWS, COLUMNS))
    writer, stored = write("gptq", {"a": weight})
    assert writer.config["bits"] == bits
    assert stored["a"]["qweight"].shape == (COLUMNS * bits // 32, ROWS)
    assert torch.equal(gptq_values(stored["a"], bits, 1), affine.dequantize(weight, torch.float32))


def test_gptq_lists_what_differs_as_patterns():
    usual, coarse = make_weight(), make_weight(WoqWeightDtype.INT8, True, PER_CHANNEL)
    names = [f"model.layers.{index}.{name}" for index in range(12) for name in ("q", "v", "up")]
    weights = {name: coarse if name.endswith("v") or name == "model.layers.3.q" else usual for name in names}
    weights["lm_head"] = coarse
    in_float = [f"model.layers.{index}.gate" for index in range(12)]
    writer, stored = write("gptq", weights, in_float, "lm_head")
    config = writer.config
    override = {"bits": 8, "group_size": -1, "sym": True}
    assert config["lm_head"] is True
    assert {key: value for key, value in config["dynamic"].items() if key[0] == "+"} == {
        r"+:^model\.layers\.\d+\.v$": override,
        r"+:^model\.layers\.3\.q$": override,
        r"+:^lm_head$": override,
    }
    assert [key for key in config["dynamic"] if key[0] == "-"] == [r"-:^model\.layers\.\d+\.gate$"]
    form = format_from_config(config)
    for name, weight in weights.items():
        back = form.read(name, stored[name], weight.shape)
        assert torch.equal(affine.dequantize(back, torch.float32), affine.dequantize(weight, torch.float32))


def test_a_head_in_float_is_no_pattern():
    config = write("gptq", {"a": make_weight()}, ["lm_head"], "lm_head")[0].config
    assert (config["lm_head"], config["dynamic"]) == (False, {})


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(symmetric):
    weight = make_weight(symmetric=symmetric)
    writer, stored = write("awq", {"a": weight}, ["b"])
    assert writer.config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["b"],
    }
    assert torch.equal(awq_values(stored["a"]), affine.dequantize(weight, torch.float32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", PACKED)
def test_compressed_tensors_packed(dtype, symmetric, act_order):
    weight = make_weight(dtype, symmetric, act_order=act_order)
    if 32 % dtype.bits:  # of 16 zero points a reader could not tell which layout they are in
        weight = dataclasses.replace(
            weight, **{name: torch.cat([t] * 2) for name, t in per_row(weight).items()}, shape=(32, COLUMNS)
        )
    writer, stored = write("compressed-tensors", {"a": weight}, ["lm_head"], "lm_head")
    bits = dtype.bits
    config = writer.config
    group = config["config_groups"]["group_0"]
    assert (config["format"], config["ignore"], group["targets"]) == ("pack-quantized", ["lm_head"], ["Linear"])
    assert group["weights"] == {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": GROUP,
        "actorder": "group" if act_order else None,
        "dynamic": False,
    }
    assert stored["a"]["weight_shape"].tolist() == list(weight.shape)
    assert stored["a"]["weight_packed"].shape == (len(weight.scales), -(-COLUMNS * bits // 32))
    assert torch.equal(packed_values(stored["a"], bits), affine.dequantize(weight, torch.float32))
    back = format_from_config(config).read("a", stored["a"], weight.shape)
    assert back.scheme == weight.scheme
    assert all(torch.equal(tensor, getattr(back, name)) for name, tensor in weight.tensors().items())


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp4_weight(group, supers=None, seed=0):
    """Random codes with scales that are powers of two or, of `supers`, float8 numbers times them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (ROWS, COLUMNS // 2), generator=generator, dtype=torch.uint8)
    if supers is None:
        scales = torch.exp2(torch.randint(-20, 20, (ROWS, COLUMNS // group), generator=generator).float())
        return QuantizedWeight(
            codes, scales, None, None, WeightScheme(WoqWeightDtype.FP4, True, group), (ROWS, COLUMNS)
        )
    numbers = (torch.rand(ROWS, COLUMNS // group, generator=generator) * 400).to(torch.float8_e4m3fn).float()
    scheme = WeightScheme(WoqWeightDtype.FP4, True, group, super_group_size=PER_CHANNEL)
    supers = torch.as_tensor(supers).expand(ROWS)[:, None].contiguous()
    return QuantizedWeight(codes, numbers * supers, None, None, scheme, (ROWS, COLUMNS), super_scales=supers)


def fp4_values(tensors):
    """By the formats' descriptions: E2M1 numbers, the first in the low bits, times their scales."""
    codes = torch.stack([tensors["weight_packed"] & 15, tensors["weight_packed"] >> 4], dim=2).flatten(1)
    values = torch.tensor(E2M1)[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    scales = tensors["weight_scale"]
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - 127)
    else:
        scales = scales.float() / tensors["weight_global_scale"]
    return values * scales.repeat_interleave(COLUMNS // scales.shape[1], dim=1)


@pytest.mark.parametrize(
    ("weight", "layout", "strategy", "group"),
    [
        (fp4_weight(16, 2.0**-10), "nvfp4-pack-quantized", "tensor_group", 16),
        (fp4_weight(32), "mxfp4-pack-quantized", "group", 32),
    ],
)
def test_compressed_tensors_fp4(weight, layout, strategy, group):
    writer, stored = write("compressed-tensors", {"a": weight})
    config = writer.config
    entry = config["config_groups"]["group_0"]
    assert (config["format"], entry["format"]) == (layout, layout)
    assert (entry["weights"]["type"], entry["weights"]["num_bits"]) == ("float", 4)
    assert (entry["weights"]["strategy"], entry["weights"]["group_size"]) == (strategy, group)
    assert torch.equal(fp4_values(stored["a"]), affine.dequantize(weight, torch.float32))
    back = format_from_config(config).read("a", stored["a"], weight.shape)
    assert back.scheme == weight.scheme
    assert all(torch.equal(tensor, getattr(back, name)) for name, tensor in weight.tensors().items())


@pytest.mark.parametrize("overall", [0.1, 3.7, 1234.5, 2688.0, 1e-5])
def test_any_global_scale_comes_back(overall):
    weight = fp4_weight(16, 1 / torch.tensor(overall) / 2)
    writer, stored = write("compressed-tensors", {"a": weight})
    back = format_from_config(writer.config).read("a", stored["a"], weight.shape)
    assert all(torch.equal(tensor, getattr(back, name)) for name, tensor in weight.tensors().items())


def test_compressed_tensors_fp8_and_int8_inputs():
    fp8 = make_weight(WoqWeightDtype.FP8, True, PER_CHANNEL)
    int8 = quantize_per_channel(torch.randn(ROWS, COLUMNS))
    static, dynamic = Int8Input(StaticActivation(0.125, 120)), Int8Input()
    weights = {"a.fp8": fp8, "a.static": int8, "a.dynamic": int8}
    writer, stored = write("compressed-tensors", weights, inputs={"a.static": static, "a.dynamic": dynamic})
    config = writer.config
    groups = {group["targets"][0]: group for group in config["config_groups"].values()}
    assert config["format"] == "mixed-precision"
    assert list(groups) == [r"re:^a\.fp8$", r"re:^a\.static$", r"re:^a\.dynamic$"]
    assert groups[r"re:^a\.fp8$"]["format"] == "float-quantized"
    assert groups[r"re:^a\.fp8$"]["input_activations"] is None
    inputs = {"num_bits": 8, "type": "int", "symmetric": False}
    assert groups[r"re:^a\.static$"]["input_activations"] == inputs | {"strategy": "tensor", "dynamic": False}
    assert groups[r"re:^a\.dynamic$"]["input_activations"] == inputs | {"strategy": "token", "dynamic": True}
    assert stored["a.static"]["input_zero_point"].tolist() == [-8]
    for name, weight in weights.items():
        found = stored[name]
        values = found["weight"].float() * found["weight_scale"].float()
        assert torch.equal(values, affine.dequantize(weight, torch.float32))
    form = format_from_config(config)
    assert form.int8_input("a.static", stored["a.static"]) == static
    assert form.int8_input("a.dynamic", stored["a.dynamic"]) == dynamic


@pytest.mark.parametrize(
    ("scales", "dtype"),
    [([0.5, 2.0**-24], torch.float16), ([0.5, 2.0**-30], torch.bfloat16), ([0.5, 0.1], torch.float32)],
)
def test_scales_are_as_narrow_as_their_values_allow(scales, dtype):
    weight = dataclasses.replace(make_weight(), scales=torch.tensor(scales).repeat(ROWS, 1))
    for form, key in (("gptq", "scales"), ("awq", "scales"), ("compressed-tensors", "weight_scale")):
        stored = write(form, {"a": weight})[1]["a"][key]
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), weight.scales if key != "scales" else weight.scales.t())


WITH_16 = make_weight()
WITH_16.zero_points[2, 1] = 16
RAGGED = affine.quantize(torch.randn(12, 64), WeightScheme(WoqWeightDtype.INT4, False, GROUP))
UNEVEN = affine.quantize(torch.randn(16, 80), WeightScheme(WoqWeightDtype.INT4, False, GROUP))
NF4 = make_weight(WoqWeightDtype.NF4, True)
FULL_3 = make_weight(WoqWeightDtype.INT3)
FULL_3.zero_points[2, 1] = 8
RAISED = read_blocks("Q4_1", torch.ones(16, 40, dtype=torch.uint8))
TWO_LEVELS = read_blocks("Q3_K", torch.ones(16, 110, dtype=torch.uint8))
SMOOTHED = Int8Input(StaticActivation(0.1, 128, torch.ones(COLUMNS)))


@pytest.mark.parametrize(
    ("form", "weight", "options", "message"),
    [
        ("gptq", NF4, {}, "its weight is NF4, the format holds INT2, INT3, INT4 and INT8"),
        ("compressed-tensors", make_weight(WoqWeightDtype.BNB_FP4, True), {}, "its weight is BNB_FP4"),
        ("gptq", fp4_weight(32), {}, "its weight is FP4, the format holds INT2, INT3, INT4 and INT8"),
        ("gptq", make_weight(WoqWeightDtype.INT6), {}, "its weight is INT6"),
        ("gptq", RAISED, {}, "its groups have float minimums"),
        ("gptq", TWO_LEVELS, {}, "its scales are integers or float8 numbers times super scales"),
        ("awq", RAISED, {}, "its groups have float minimums"),
        ("awq", TWO_LEVELS, {}, "its weight is INT3, the format holds INT4"),
        ("compressed-tensors", RAISED, {}, "its groups have float minimums"),
        ("compressed-tensors", TWO_LEVELS, {}, "its scales are integers or float8 numbers times super scales"),
        ("compressed-tensors", FULL_3, {}, "it has a zero point of 8, compressed-tensors stores 0..7 in 3 bits"),
        ("compressed-tensors", make_weight(WoqWeightDtype.INT3), {}, "16 codes of 3 bits take as many words"),
        ("compressed-tensors", fp4_weight(16), {}, "mxfp4-pack-quantized has groups of 32 in 64 input features"),
        ("compressed-tensors", fp4_weight(32, 0.5), {}, "nvfp4-pack-quantized has groups of 16"),
        ("compressed-tensors", make_weight(WoqWeightDtype.FP4, True), {}, "its scales are no powers of two"),
        (
            "compressed-tensors",
            fp4_weight(16, torch.linspace(1, 2, ROWS)),
            {},
            "it has other super scales than one positive one",
        ),
        ("gptq", quantize_per_channel(torch.randn(8, 64)), {"inputs": {"a": Int8Input()}}, "it quantizes its input"),
        ("awq", make_weight(WoqWeightDtype.INT8), {}, "its weight is INT8, the format holds INT4"),
        ("awq", make_weight(act_order=True), {}, "its groups are in act-order"),
        ("awq", make_weight(), {"head": "a"}, "it is the output layer, which AWQ's tools keep in float"),
        ("awq", WITH_16, {}, "it has a zero point of 16, AWQ stores 0..15"),
        ("awq", RAGGED, {}, "AWQ stores 8 outputs to a word, it has 12"),
        ("compressed-tensors", NF4, {}, "its weight is NF4"),
        ("compressed-tensors", WITH_16, {}, "it has a zero point of 16, compressed-tensors stores 0..15 in 4 bits"),
        ("compressed-tensors", UNEVEN, {}, "its 80 input features are no whole number of groups of 32"),
        (
            "compressed-tensors",
            quantize_per_channel(torch.randn(8, COLUMNS)),
            {"inputs": {"a": SMOOTHED}},
            "it multiplies its input by a smoothing factor",
        ),
    ],
)
def test_what_a_format_does_not_hold(form, weight, options, message):
    with pytest.raises(LayerError, match=f"^a: {re.escape(message)}"):
        write(form, {"a": weight}, **options)


def test_awq_has_one_group_size():
    weights = {"a": make_weight(), "b": make_weight(), "c": make_weight(group_size=16)}
    with pytest.raises(LayerError, match="c: its group size is 16, that of others 32"):
        write("awq", weights)
