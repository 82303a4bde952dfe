import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.checkpoints import open_checkpoint, read_awq
from ipex_quant.checkpoints.awq import AwqFormat
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(rows):
    """Rows of 4-bit fields in AWQ's words, one field at a time."""
    packed = []
    for row in rows:
        words = [0] * -(-len(row) // 8)
        for column, value in enumerate(row):
            words[column // 8] |= value << (4 * OUTPUT_OF_NIBBLE.index(column % 8))
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def make_module(out_features, in_features, group_size, seed=0, zero_point=None):
    """The tensors of a random module, and its weight by formula."""
    generator = torch.Generator().manual_seed(seed)
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator)
    zeros = torch.randint(0, 16, (groups, out_features), generator=generator)
    zeros = zeros if zero_point is None else torch.full_like(zeros, zero_point)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.5).bfloat16()
    g_idx = torch.arange(in_features) // size
    weight = ((codes - zeros[g_idx]) * scales[g_idx].float()).t()
    return {"qweight": pack_rows(codes.tolist()), "qzeros": pack_rows(zeros.tolist()), "scales": scales}, weight


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from([-1, 16, 32, 128]), st.integers(0, 99))
def test_read_is_what_the_format_says(words, in_features, group_size, seed):
    tensors, weight = make_module(8 * words, in_features, group_size, seed)
    assert torch.equal(dequantize(read_awq(tensors, group_size)), weight)


def test_the_group_size_is_inferred():
    tensors, weight = make_module(16, 96, 32)
    qw = read_awq(tensors, shape=(16, 96))
    assert qw.scheme == WeightScheme(WoqWeightDtype.INT4, False, 32)
    assert torch.equal(dequantize(qw), weight)


def test_zero_points_of_8_are_symmetric():
    tensors, weight = make_module(16, 64, 32, zero_point=8)
    qw = read_awq(tensors)
    assert qw.scheme.symmetric
    assert torch.equal(dequantize(qw), weight)


def test_outputs_that_fill_no_word():
    tensors, weight = make_module(13, 32, 16)
    assert torch.equal(dequantize(read_awq(tensors, 16, shape=(13, 32))), weight)


def test_a_g_idx_in_natural_order_changes_nothing():
    tensors, weight = make_module(8, 64, 32)
    qw = read_awq(tensors | {"g_idx": torch.arange(64, dtype=torch.int32) // 32}, 32)
    assert qw.g_idx is None
    assert torch.equal(dequantize(qw), weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qweight": None}, ValueError, "qweight: missing"),
        ({"qzeros": None}, ValueError, "qzeros: missing"),
        ({"qweight": torch.zeros(64, 3, dtype=torch.int32)}, ValueError, r"qweight: expected shape \[64, 2\]"),
        ({"qweight": torch.zeros(63, 2, dtype=torch.int32)}, ValueError, r"qweight: expected shape \[64, 2\]"),
        ({"qweight": torch.zeros(64, dtype=torch.int32)}, ValueError, "qweight: expected 2 dimensions"),
        ({"qweight": torch.zeros(64, 2)}, TypeError, "qweight: expected dtype torch.int32"),
        ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, r"qzeros: expected shape \[2, 2\]"),
        ({"qzeros": torch.zeros((), dtype=torch.int32)}, ValueError, "qzeros: expected 2 dimensions"),
        ({"scales": torch.ones(3, 16)}, ValueError, r"scales: expected shape \[2, 16\]"),
        ({"scales": torch.ones(2, 16, dtype=torch.int64)}, TypeError, "scales: expected dtype"),
        ({"scales": torch.full((2, 16), float("nan"))}, ValueError, "scales: expected finite values"),
        ({"g_idx": torch.full((64,), 9)}, ValueError, r"g_idx: expected groups 0\.\.1"),
    ],
)
def test_damaged_tensors_raise(change, error, message):
    tensors = {name: t for name, t in (make_module(16, 64, 32)[0] | change).items() if t is not None}
    with pytest.raises(error, match=message):
        read_awq(tensors, 32, shape=(16, 64))


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True},
        {"bits": 4, "group_size": 32, "checkpoint_format": "gemm", "format": "gemm", "desc_act": False},
        {},
    ],
)
def test_configurations_of_all_writers(config):
    tensors, weight = make_module(16, 64, 32)
    state_dict = {f"fc.{name}": tensor for name, tensor in tensors.items()} | {"fc.bias": torch.ones(16)}
    checkpoint = open_checkpoint((state_dict, {"quant_method": "awq"} | config))
    qw, bias = checkpoint.quantized_weight("fc", 64, 16)
    assert torch.equal(dequantize(qw), weight)
    assert torch.equal(bias, torch.ones(16))
    assert checkpoint.other_tensors() == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "marlin"}, r"version: expected one of \['gemm', .*\], got 'marlin'"),
        ({"version": 3}, r"version: expected one of .* got 3"),
        ({"bits": 8}, "bits: expected 4 for AWQ, got 8"),
        ({"group_size": "32"}, "group_size: expected an integer, got '32'"),
    ],
)
def test_other_configurations_raise(config, message):
    with pytest.raises(ValueError, match=message):
        AwqFormat.from_config(config)


def gemv_module(out_features=16, in_features=96, group_size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator)
    scales = (torch.rand(out_features, groups, generator=generator) + 0.5).half()
    index = torch.arange(in_features) // group_size
    return codes, zeros, scales, (codes - zeros[:, index]) * scales.float()[:, index]


def in_order(rows):
    """Rows of 4-bit fields in int32 words, the first in the lowest bits."""
    words = [
        [sum(value << 4 * i for i, value in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        for row in rows
    ]
    return torch.tensor(words).to(torch.uint32).view(torch.int32)


def test_gemv():
    codes, zeros, scales, weight = gemv_module()
    filled = torch.zeros(16, 5, dtype=torch.long)
    tensors = {
        "qweight": in_order(codes.tolist()),
        "qzeros": in_order(torch.cat((zeros, filled), 1).tolist()),
        "scales": torch.cat((scales, filled.half()), 1),
    }
    form = AwqFormat.from_config({"version": "gemv", "group_size": 32, "bits": 4})
    assert torch.equal(dequantize(form.read("m", tensors, (16, 96))), weight)
    assert torch.equal(dequantize(form.read("m", tensors, (None, None))), weight)
    with pytest.raises(ValueError, match="group_size: the configuration does not tell"):
        AwqFormat().read("m", tensors, (16, 96))
    with pytest.raises(ValueError, match=r"qweight: expected shape \[16, 16\], got \[16, 12\]"):
        form.read("m", tensors, (16, 128))
    with pytest.raises(ValueError, match="scales: expected at least 3 groups, got 2"):
        form.read("m", tensors | {"scales": scales[:, :2]}, (16, 96))


def interleaved(codes):
    """int16 ``[N / 4, K]`` of codes, as llm-awq's `pack_intweight` orders them, one after the other."""
    rows, columns = codes.shape
    packed = torch.zeros(rows // 4, columns, dtype=torch.int32)
    for row in range(rows):
        for column in range(columns):
            block, place = divmod(column, 32)
            a, b, c = place // 8, place // 2 % 4, place % 2  # four runs of eight: four pairs
            place = 8 * b + 2 * a + c  # a pair of each run next to each other
            run, place = divmod(place, 8)
            place = 8 * run + place // 2 + 4 * (place % 2)  # the first of all pairs, then the second
            inside = 32 * (block % 2) + place
            turn = column // 64 * 256 + row % 4 * 64 + inside
            packed[row // 4, turn // 4] |= int(codes[row, column]) << 4 * (turn % 4)
    return packed.to(torch.uint16).view(torch.int16)


@pytest.mark.parametrize(("version", "key"), [("gemv_fast", "qzeros"), ("llm-awq", "scaled_zeros")])
def test_gemv_fast(version, key):
    codes, zeros, scales, _ = gemv_module(in_features=128)
    scaled = -(scales * zeros)
    index = torch.arange(128) // 32
    tensors = {
        "qweight": interleaved(codes),
        "scales": torch.cat((scales.t(), torch.zeros(4, 16))).half(),
        key: torch.cat((scaled.t(), torch.zeros(4, 16))).half(),
    }
    form = AwqFormat.from_config({"version": version, "group_size": 32})
    qw = form.read("m", tensors, (16, 128))
    assert torch.equal(dequantize(qw), codes * scales.float()[:, index] + scaled.float()[:, index])
    with pytest.raises(ValueError, match="qzeros: missing"):
        form.read("m", {name: tensor for name, tensor in tensors.items() if name != key}, (16, 128))
    with pytest.raises(ValueError, match="4 rows in turn of 64 columns"):
        form.read("m", tensors, (16, 96))
