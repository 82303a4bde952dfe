import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.checkpoints.gptq import GptqFormat, gptq_tensors, read_gptq
from ipex_quant.numerics.affine import dequantize, quantize
from ipex_quant.numerics.nibbles import pack_nibbles, unpack_nibbles
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_read_is_what_the_format_says(bits, v2, act_order, make_gptq_module):
    module = make_gptq_module(bits, 32, 96, 32, v2=v2, act_order=act_order)
    qw = read_gptq(module.tensors, bits, 32, v2=v2, shape=(32, 96))
    assert torch.equal(dequantize(qw), module.weight)
    assert qw.scheme == WeightScheme(WoqWeightDtype[f"INT{bits}"], False, 32)
    assert (qw.g_idx is not None) == act_order


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_write_is_what_the_format_says(bits, v2, make_gptq_module):
    module = make_gptq_module(bits, 32, 96, 32, v2=v2, act_order=True)
    qw = read_gptq(module.tensors, bits, 32, v2=v2)
    written = gptq_tensors(qw, bits, v2=v2)
    assert written.keys() == module.tensors.keys()
    for key, tensor in module.tensors.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize(("bits", "zero"), [(4, 8), (8, 128)])
def test_all_zero_points_symmetric_means_symmetric(bits, zero, make_gptq_module):
    module = make_gptq_module(bits, 16, 64, -1, zero_points=zero)
    qw = read_gptq(module.tensors, bits, -1)
    assert qw.scheme.symmetric
    assert qw.zero_points is None
    assert torch.equal(dequantize(qw), module.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_middle_of_the_codes_as_zero_point_is_symmetric(make_gptq_module, bits):
    module = make_gptq_module(bits, 32, 64, 32, zero_points=1 << (bits - 1))
    qw = read_gptq(module.tensors, bits, 32)
    assert qw.scheme == WeightScheme(WoqWeightDtype[f"INT{bits}"], True, 32)
    assert torch.equal(dequantize(qw), module.weight)


def planes(codes, bits):
    """int32 words ``[words, N]`` of codes ``[K, N]``: the low bits of 32 codes, then the higher ones, word by word."""
    words = []
    for start in range(0, len(codes), 32):
        first = 0
        for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
            plane = codes[start : start + 32].long() >> first & ((1 << width) - 1)
            per_word = 32 // width
            for word in range(width):
                own = plane[word * per_word : (word + 1) * per_word]
                words.append((own << (width * torch.arange(per_word))[:, None]).sum(0))
            first += width
    return torch.stack(words).to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_planes(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (64, 32), generator=generator)
    zeros = torch.randint(0, 1 << bits, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator) + 0.5
    tensors = {"qweight": planes(codes, bits), "qzeros": planes(zeros.t(), bits).t().contiguous(), "scales": scales}
    form = GptqFormat.from_config({"bits": bits, "group_size": 32, "format": "gptq_p"})
    qw = form.read("m", tensors, (32, 64))
    assert qw.scheme.dtype == WoqWeightDtype["INT8" if bits > 6 else f"INT{bits}"]
    groups = torch.arange(64) // 32
    assert torch.equal(dequantize(qw), ((codes - zeros[groups]) * scales[groups]).t())


def test_planes_are_of_32_codes():
    tensors = {
        "qweight": torch.zeros(9, 40, dtype=torch.int32),
        "qzeros": torch.zeros(2, 4),
        "scales": torch.ones(2, 40),
    }
    with pytest.raises(ValueError, match="planes are of 32 codes, which do not divide 40 x 96"):
        read_gptq(tensors, 3, 64, planar=True, shape=(40, 96))


def test_version_1_field_15_is_zero_point_16(make_gptq_module):
    module = make_gptq_module(4, 16, 64, 32, zero_points=16)
    qw = read_gptq(module.tensors, 4, 32)
    assert (qw.zero_points == 16).all()
    assert torch.equal(dequantize(qw), module.weight)
    assert torch.equal(gptq_tensors(qw)["qzeros"], module.tensors["qzeros"])


@pytest.mark.parametrize(("in_features", "group_size"), [(80, 32), (33, 16), (7, 4), (40, -1), (40, 128)])
def test_ragged_groups_and_odd_lengths(in_features, group_size, make_gptq_module):
    module = make_gptq_module(4, 5, in_features, group_size, v2=True)
    qw = read_gptq(module.tensors, 4, group_size, v2=True, shape=(5, in_features))
    assert torch.equal(dequantize(qw), module.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_bits_and_group_size_are_inferred_from_the_shapes(bits, group_size, make_gptq_module):
    module = make_gptq_module(bits, 32, 96, group_size)
    qw = read_gptq(module.tensors)
    assert torch.equal(dequantize(qw), module.weight)
    assert qw.scheme.group_size == group_size


def test_group_size_longer_than_the_row_is_per_channel(make_gptq_module):
    module = make_gptq_module(4, 8, 96, -1)
    assert read_gptq(module.tensors, 4, 96).scheme.group_size == -1
    assert read_gptq(module.tensors, 4, 128).scheme.group_size == 128


def test_g_idx_of_zeros_is_a_filler(make_gptq_module):
    module = make_gptq_module(4, 8, 64, 32)
    qw = read_gptq(module.tensors | {"g_idx": torch.zeros(64, dtype=torch.int32)}, 4, 32)
    assert torch.equal(dequantize(qw), module.weight)


def test_scales_may_be_any_float(make_gptq_module):
    module = make_gptq_module(4, 8, 64, 32)
    for dtype in (torch.float32, torch.bfloat16):
        scales = module.tensors["scales"].to(dtype)
        assert torch.equal(read_gptq(module.tensors | {"scales": scales}, 4, 32).scales, scales.float().t())


@st.composite
def quantized_weights(draw):
    out_features, in_features = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    group_size = draw(st.sampled_from([-1, 1, 2, 16, 64, 128]))
    dtype = draw(st.sampled_from([WoqWeightDtype.INT4, WoqWeightDtype.INT8]))
    symmetric, act_order = draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    qw = quantize(
        torch.randn(out_features, in_features, generator=generator), WeightScheme(dtype, symmetric, group_size)
    )
    features = torch.arange(in_features, dtype=torch.int32)
    g_idx = (features.zero_() if group_size == -1 else features // group_size)[
        torch.randperm(in_features, generator=generator)
    ]
    act_order = act_order and not g_idx.equal(g_idx.sort().values)
    return dataclasses.replace(qw, scales=qw.scales.half().float(), g_idx=g_idx if act_order else None)


@settings(max_examples=80, deadline=None)
@given(quantized_weights())
def test_what_was_written_reads_back(qw: QuantizedWeight):
    back = read_gptq(gptq_tensors(qw, v2=True), None if qw.shape[1] >= 32 else _bits(qw), qw.scheme.group_size, v2=True)
    # Zero points may happen to be all symmetric.
    assert back.scheme.symmetric >= qw.scheme.symmetric
    assert back.shape == qw.shape
    assert torch.equal(back.codes, qw.codes)
    assert torch.equal(back.scales, qw.scales)
    assert torch.equal(dequantize(back), dequantize(qw))
    assert (back.g_idx is None) == (qw.g_idx is None)


def _bits(qw: QuantizedWeight) -> int:
    return 8 if qw.scheme.dtype == WoqWeightDtype.INT8 else 4


def _broken(tensors: dict, **changes: object) -> dict:
    changed = {**tensors, **changes}
    return {key: tensor for key, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": None}, r"qzeros: missing, the checkpoint holds only \['g_idx', 'qweight', 'scales'\]"),
        ({"scales": None, "qweight": None}, "qweight, scales: missing"),
        ({"qweight": torch.zeros(7, 32, dtype=torch.int32)}, r"qweight: expected shape \[8, 32\], got \[7, 32\]"),
        ({"qweight": torch.zeros(256, dtype=torch.int32)}, "qweight: expected 2 dimensions"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, r"qzeros: expected shape \[2, 4\], got \[2, 3\]"),
        ({"scales": torch.ones(2, 31)}, r"scales: expected shape \[groups, 32\], got \[2, 31\]"),
        ({"scales": torch.ones(3, 32)}, r"scales: expected shape \[2, 32\], got \[3, 32\]"),
        ({"scales": torch.full((2, 32), float("nan"))}, "scales: expected finite values"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx: expected shape \[64\], got \[63\]"),
        ({"g_idx": torch.tensor([0] * 31 + [1] * 33)}, "g_idx: expected 32 features in group 0, got 31"),
        ({"g_idx": torch.tensor([0] * 32 + [2] * 32)}, r"g_idx: expected groups 0..1, got 0..2"),
        ({"g_idx": torch.tensor([-1] + [0] * 31 + [1] * 32)}, r"g_idx: expected groups 0..1, got -1..1"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int32, device="meta")}, "qweight: expected a tensor in CPU memory"),
    ],
)
def test_inconsistent_tensors_raise(changes, message, make_gptq_module):
    tensors = _broken(make_gptq_module(4, 32, 64, 32).tensors, **changes)
    with pytest.raises(ValueError, match=message):
        read_gptq(tensors, 4, 32, shape=(32, 64))


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales", "g_idx"])
def test_another_dtype_raises(key, make_gptq_module):
    tensors = make_gptq_module(4, 32, 64, 32).tensors
    with pytest.raises(TypeError, match=f"{key}: expected dtype .* got torch.int16"):
        read_gptq(tensors | {key: tensors[key].to(torch.int16)}, 4, 32, shape=(32, 64))


def test_group_size_that_is_no_power_of_two_raises(make_gptq_module):
    tensors = make_gptq_module(4, 8, 96, 32).tensors
    with pytest.raises(ValueError, match=r"group_size: expected .* power of 2, got 48"):
        read_gptq(tensors, 4, 48)


def test_bits_that_nothing_tells_raise(make_gptq_module):
    tensors = _broken(make_gptq_module(4, 8, 64, 32).tensors, g_idx=None)
    with pytest.raises(ValueError, match="bits: neither"):
        read_gptq(tensors)
    with pytest.raises(ValueError, match=r"qweight: expected one of the shapes .* got \[8, 8\]"):
        read_gptq(tensors, shape=(8, 100))


def test_version_1_cannot_hold_zero_point_0(make_gptq_module):
    qw = read_gptq(make_gptq_module(4, 8, 64, 32, v2=True, zero_points=0).tensors, 4, 32, v2=True)
    with pytest.raises(ValueError, match=r"version 1 stores 1..16 in 4 bits, got 0..0; write version 2"):
        gptq_tensors(qw)


def test_version_2_cannot_hold_zero_point_16(make_gptq_module):
    qw = read_gptq(make_gptq_module(4, 8, 64, 32, zero_points=16).tensors, 4, 32)
    with pytest.raises(ValueError, match=r"version 2 stores 0..15 in 4 bits, got 16..16; write version 1"):
        gptq_tensors(qw, v2=True)


def test_write_refuses_what_does_not_fit():
    qw = quantize(torch.randn(8, 64), WeightScheme(WoqWeightDtype.INT4, True, 32))
    with pytest.raises(ValueError, match="codes: expected values below 4 for 2 bits"):
        gptq_tensors(qw, 2)
    with pytest.raises(ValueError, match=r"bits: expected one of \(4, 3, 2\)"):
        gptq_tensors(qw, 8)
    for scale in (1e6, 1e-12):
        with pytest.raises(ValueError, match=r"scales: not representable in torch.float16"):
            gptq_tensors(dataclasses.replace(qw, scales=torch.full_like(qw.scales, scale)))
    with pytest.raises(ValueError, match=r"GPTQ files hold integers of \[2, 3, 4, 8\] bits with zero points, got nf4"):
        gptq_tensors(quantize(torch.randn(8, 64), WeightScheme(WoqWeightDtype.NF4)))


@pytest.mark.parametrize("dtype", ["INT2", "INT3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_narrow_weights_are_written_and_read(dtype, symmetric):
    qw = quantize(torch.randn(8, 64), WeightScheme(WoqWeightDtype[dtype], symmetric, 32))
    qw = dataclasses.replace(qw, scales=qw.scales.half().float())
    read = read_gptq(gptq_tensors(qw, v2=True), qw.scheme.dtype.bits, 32, v2=True)
    assert torch.equal(dequantize(read), dequantize(qw))


def test_config_names_the_layout():
    assert GptqFormat.from_config({"bits": 4, "group_size": 128}) == GptqFormat(4, 128)
    for key in ("format", "checkpoint_format"):
        assert GptqFormat.from_config({"bits": 3, "group_size": -1, key: "gptq_v2"}) == GptqFormat(3, -1, True)
    assert GptqFormat.from_config({"pack_dtype": "int32", "meta": {"pack_dtype": "torch.int32"}}) == GptqFormat()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            r"checkpoint_format: expected one of \['gptq', 'gptq_v2', 'gptq_p'\], got 'marlin'",
        ),
        ({"is_marlin_format": True}, "got 'marlin'"),
        ({"format": "bitblas"}, "got 'bitblas'"),
        ({"checkpoint_format": "gptq_x"}, "got 'gptq_x'"),
        ({"pack_dtype": "int16"}, "pack_dtype: expected 'int32', got 'int16'"),
        ({"meta": {"pack_dtype": "int8"}}, "pack_dtype: expected 'int32', got 'int8'"),
        ({"bits": 5}, r"bits: expected one of \[2, 3, 4, 8\] for GPTQ, got 5"),
        ({"bits": "4"}, "bits: expected one of"),
        ({"group_size": "128"}, "group_size: expected an integer, got '128'"),
        ({"desc_act": "false"}, "desc_act: expected true or false, got 'false'"),
        ({"static_groups": 2}, "static_groups: expected true or false, got 2"),
        ({"dynamic": ["a"]}, "dynamic: expected a mapping of patterns to overrides, got list"),
        ({"dynamic": {"+:(": {}}}, "is not a regular expression"),
        ({"dynamic": {"a": 8}}, "dynamic: expected a mapping of overrides for 'a', got 8"),
    ],
)
def test_config_that_is_not_read_raises(config, message):
    with pytest.raises(ValueError, match=message):
        GptqFormat.from_config(config)


def test_dynamic_is_matched_in_bounded_time():
    form = GptqFormat.from_config({"bits": 4, "dynamic": {r"-:(([a-z_0-9]+)+\.?)+!": {}}})
    assert form._overridden("model.layers.0.self_attn.q_proj") == form


def test_dynamic_overrides_a_module(make_gptq_module):
    form = GptqFormat.from_config(
        {
            "bits": 4,
            "group_size": 64,
            "dynamic": {
                r"-:.*\.gate$": {},
                r"+:.*\.down": {"bits": 8, "group_size": 32, "mse": 2.0},
                r"model\.0\.": {"bits": 2},
                r".*\.down_proj": {"bits": 3},  # never reached, an earlier pattern matches
            },
        }
    )
    shape = (32, 64)
    for name, bits, group_size in (
        ("model.1.up", 4, 64),
        ("model.1.down_proj", 8, 32),
        ("model.0.up", 2, 64),
    ):
        module = make_gptq_module(bits, *shape, group_size)
        assert torch.equal(dequantize(form.read(name, module.tensors, shape)), module.weight)
    with pytest.raises(ValueError, match="qweight: stored, though dynamic leaves the module in float"):
        form.read("model.1.gate", module.tensors, shape)


NO_G_IDX = [("missing", None), ("all zero", torch.zeros(64, dtype=torch.int32))]


@pytest.mark.parametrize(("what", "g_idx"), NO_G_IDX)
def test_desc_act_needs_a_g_idx(what, g_idx, make_gptq_module):
    form = GptqFormat.from_config({"bits": 4, "group_size": 32, "desc_act": True, "static_groups": False})
    module = make_gptq_module(4, 8, 64, 32, act_order=True)
    assert torch.equal(dequantize(form.read("m", module.tensors, (8, 64))), module.weight)
    with pytest.raises(ValueError, match=f"^g_idx: {what}, though the configuration says desc_act: .* 2 groups"):
        form.read("m", _broken(module.tensors, g_idx=g_idx), (8, 64))


@pytest.mark.parametrize(("what", "g_idx"), NO_G_IDX)
def test_desc_act_needs_none_for_one_group(what, g_idx, make_gptq_module):
    form = GptqFormat.from_config({"bits": 4, "group_size": -1, "desc_act": True})
    module = make_gptq_module(4, 8, 64, -1)
    assert torch.equal(dequantize(form.read("m", _broken(module.tensors, g_idx=g_idx), (8, 64))), module.weight)


@pytest.mark.parametrize("recorded", [{"static_groups": True}, {"meta": {"static_groups": True}}])
def test_static_groups_are_in_natural_order(recorded, make_gptq_module):
    form = GptqFormat.from_config({"bits": 4, "group_size": 32, "desc_act": True} | recorded)
    module = make_gptq_module(4, 8, 64, 32)
    for g_idx in (module.tensors["g_idx"], *(g_idx for _, g_idx in NO_G_IDX)):
        assert torch.equal(dequantize(form.read("m", _broken(module.tensors, g_idx=g_idx), (8, 64))), module.weight)


def test_dynamic_overrides_desc_act(make_gptq_module):
    config = {"bits": 4, "group_size": 32, "desc_act": True, "dynamic": {"m": {"desc_act": False}}}
    form = GptqFormat.from_config(config)
    module = make_gptq_module(4, 8, 64, 32)
    tensors = _broken(module.tensors, g_idx=None)
    assert torch.equal(dequantize(form.read("m", tensors, (8, 64))), module.weight)
    with pytest.raises(ValueError, match="g_idx: missing"):
        form.read("n", tensors, (8, 64))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(128, 1), (128, 3), (128, 4), (128, 8), (1, 8), (1, 64), (1, 1), (5, 2)])
def test_layers_of_few_inputs_or_outputs(shape, bits):
    scheme = WeightScheme(WoqWeightDtype[f"INT{bits}"], False, 32)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qw = quantize(weight, scheme)
    if bits < 4:
        codes = unpack_nibbles(qw.codes, shape[1]) >> (4 - bits)
        zero_points = qw.zero_points >> (4 - bits)
        qw = dataclasses.replace(qw, codes=pack_nibbles(codes), zero_points=zero_points)
    found = read_gptq(gptq_tensors(qw, bits, v2=True, scale_dtype=torch.float32), bits, 32, v2=True, shape=shape)
    assert torch.equal(dequantize(found), dequantize(qw))
