import pytest
import torch

from ipex_quant.nn.weight_tensors import WoqWeightFormat, read_tensors
from ipex_quant.numerics import affine
from ipex_quant.numerics.nibbles import unpack_nibbles
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

N, K, GROUP = 16, 64, 16


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(N, K)


def int4(weight, symmetric=False, group_size=GROUP):
    return affine.quantize(weight, WeightScheme(WoqWeightDtype.INT4, symmetric, group_size))


def words(codes):
    """Eight 4-bit codes an int32, the first in the lowest bits."""
    codes = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (codes << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def gptq(qw):
    codes = unpack_nibbles(qw.codes, qw.shape[1])
    return {
        "qweight": words(codes).t().contiguous(),
        "scales": qw.scales.t().contiguous(),
        "zero_points": words(qw.zero_points.t() - 1),
        "g_idx": qw.g_idx,
    }


def assert_same(actual, expected):
    assert actual.scheme == expected.scheme
    torch.testing.assert_close(affine.dequantize(actual), affine.dequantize(expected), rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT8, WoqWeightDtype.INT4])
def test_plain_tensors_as_they_are(weight, dtype, symmetric):
    qw = affine.quantize(weight, WeightScheme(dtype, symmetric, GROUP))
    zero_points = None if symmetric else qw.zero_points.float()
    tensors = {"qweight": qw.codes, "scales": qw.scales, "zero_points": zero_points}
    assert_same(read_tensors(tensors, dtype, (N, K), GROUP), qw)


def test_plain_per_channel_tensors_may_have_one_dimension(weight):
    qw = affine.quantize(weight, WeightScheme(WoqWeightDtype.INT8, False))
    tensors = {"qweight": qw.codes, "scales": qw.scales[:, 0], "zero_points": qw.zero_points[:, 0]}
    assert_same(read_tensors(tensors, WoqWeightDtype.INT8, (N, K)), qw)


@pytest.mark.parametrize("columns", [64, 61])
def test_plain_int32_words(columns):
    qw = int4(torch.randn(N, columns))
    tensors = {
        "qweight": words(unpack_nibbles(qw.codes, columns)),
        "scales": qw.scales,
        "zero_points": words(qw.zero_points),
    }
    assert_same(read_tensors(tensors, WoqWeightDtype.INT4, (N, columns), GROUP), qw)


def test_plain_codes_with_zero_points_in_words(weight):
    qw = int4(weight, group_size=4)
    tensors = {"qweight": qw.codes, "scales": qw.scales, "zero_points": words(qw.zero_points)}
    assert_same(read_tensors(tensors, WoqWeightDtype.INT4, (N, K), 4), qw)


@pytest.mark.parametrize(
    "g_idx",
    [torch.arange(K // GROUP).repeat(GROUP), torch.randperm(K, generator=torch.Generator().manual_seed(0)) // GROUP],
)
def test_a_part_of_the_input_features_refers_to_all_groups(weight, g_idx):
    whole = int4(weight)
    values = affine.stored_codes(whole).float() - whole.zero_points[:, g_idx]
    expected = values * whole.scales[:, g_idx]
    for part in (slice(0, 24), slice(24, 64)):
        codes = whole.codes[:, part.start // 2 : part.stop // 2]
        tensors = {"qweight": codes, "scales": whole.scales, "zero_points": whole.zero_points, "g_idx": g_idx[part]}
        read = read_tensors(tensors, WoqWeightDtype.INT4, (N, part.stop - part.start), GROUP)
        assert torch.equal(affine.dequantize(read), expected[:, part])


def test_group_size_follows_from_the_scales(weight):
    qw = int4(weight)
    tensors = {"qweight": qw.codes, "scales": qw.scales, "zero_points": qw.zero_points}
    assert read_tensors(tensors, WoqWeightDtype.INT4, (N, K)).scheme.group_size == GROUP


def test_gptq_tensors(weight):
    qw = int4(weight)
    assert_same(read_tensors(gptq(qw), WoqWeightDtype.INT4, (N, K), GROUP, WoqWeightFormat.GPTQ_FORMAT), qw)


def test_gptq_act_order(weight):
    qw = int4(weight)
    g_idx = (torch.arange(K, dtype=torch.int32) // GROUP).flip(0)
    read = read_tensors(gptq(qw) | {"g_idx": g_idx}, WoqWeightDtype.INT4, (N, K), GROUP, WoqWeightFormat.GPTQ_FORMAT)
    assert torch.equal(read.g_idx, g_idx)


@pytest.mark.parametrize("g_idx", [torch.arange(K) // GROUP, torch.zeros(K, dtype=torch.int32)])
def test_a_g_idx_that_says_nothing_is_dropped(weight, g_idx):
    qw = int4(weight)
    tensors = gptq(qw) | {"g_idx": g_idx}
    assert read_tensors(tensors, WoqWeightDtype.INT4, (N, K), GROUP, WoqWeightFormat.GPTQ_FORMAT).g_idx is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(K // 8 - 1, N, dtype=torch.int32)}, r"qweight: expected shape \[8, 16\]"),
        ({"qweight": torch.zeros(K // 8, N, dtype=torch.int64)}, "qweight: expected dtype torch.int32"),
        ({"scales": torch.zeros(4, N - 1)}, "scales: expected shape"),
        ({"zero_points": None}, "zero_points: missing"),
        ({"zero_points": torch.zeros(3, N // 8, dtype=torch.int32)}, "zero_points: expected shape"),
        (
            {"zero_points": torch.zeros(4, N // 8 - 1, dtype=torch.int32)},
            r"zero_points: expected shape \[4, 2\], got \[4, 1\]",
        ),
        (
            {"zero_points": torch.zeros(4, dtype=torch.int32)},
            r"zero_points: expected shape \[4, 2\], got \[4\]",
        ),
        ({"scales": torch.ones(4, N, dtype=torch.int32)}, "scales: expected dtype .*, got torch.int32"),
        ({"g_idx": torch.full((K,), 7)}, "g_idx"),
        ({"g_idx": torch.zeros(K - 1, dtype=torch.int32)}, r"g_idx: expected shape \[64\], got \[63\]"),
        ({"g_idx": torch.zeros(K)}, "g_idx: expected dtype .*, got torch.float32"),
    ],
)
def test_damaged_gptq_tensors_raise(weight, change, message):
    tensors = gptq(int4(weight)) | change
    with pytest.raises((ValueError, TypeError), match=message):
        read_tensors(tensors, WoqWeightDtype.INT4, (N, K), GROUP, WoqWeightFormat.GPTQ_FORMAT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(N - 1, K // 2, dtype=torch.uint8)}, "codes: expected shape"),
        ({"scales": torch.ones(N - 1, 4)}, "scales: expected shape"),
        ({"scales": torch.ones(N, 4, 1)}, "scales: expected shape"),
        ({"scales": torch.ones(N, 4, dtype=torch.int64)}, "scales: expected a floating-point dtype, got torch.int64"),
        ({"zero_points": torch.ones(N, 3)}, "zero_points: expected shape"),
    ],
)
def test_damaged_plain_tensors_raise(weight, change, message):
    qw = int4(weight)
    tensors = {"qweight": qw.codes, "scales": qw.scales, "zero_points": qw.zero_points} | change
    with pytest.raises(ValueError, match=message):
        read_tensors(tensors, WoqWeightDtype.INT4, (N, K), GROUP)


def test_awq_tensors(weight):
    qw = int4(weight)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    in_nibbles = (unpack_nibbles(qw.codes, K).t(), qw.zero_points.t().to(torch.uint8))
    packed = [words(each.unflatten(1, (-1, 8))[..., order].flatten(1).contiguous()) for each in in_nibbles]
    tensors = {"qweight": packed[0], "scales": qw.scales.t(), "zero_points": packed[1], "g_idx": None}
    read = read_tensors(tensors, WoqWeightDtype.INT4, (N, K), GROUP, WoqWeightFormat.AWQ_FORMAT)
    assert torch.equal(affine.dequantize(read), affine.dequantize(qw))
    with pytest.raises(ValueError, match="zero_points: expected shape"):
        read_tensors(
            tensors | {"zero_points": packed[1][1:]}, WoqWeightDtype.INT4, (N, K), GROUP, WoqWeightFormat.AWQ_FORMAT
        )


@pytest.mark.parametrize("weight_format", [WoqWeightFormat.GPTQ_FORMAT, WoqWeightFormat.AWQ_FORMAT])
def test_checkpoint_formats_hold_int4(weight, weight_format):
    with pytest.raises(ValueError, match=f"{weight_format.name} holds INT4 codes"):
        read_tensors(gptq(int4(weight)), WoqWeightDtype.INT8, (N, K), GROUP, weight_format)


@pytest.mark.parametrize("columns", [1, 3, 8])
def test_layers_of_few_inputs(columns):
    qw = int4(torch.randn(N, columns, generator=torch.Generator().manual_seed(0)))
    codes = words(unpack_nibbles(qw.codes, columns))
    plain = {"qweight": codes, "scales": qw.scales, "zero_points": qw.zero_points}
    assert_same(read_tensors(plain, WoqWeightDtype.INT4, (N, columns), GROUP), qw)
    plain["qweight"] = codes.t().contiguous().t()
    assert_same(read_tensors(plain, WoqWeightDtype.INT4, (N, columns), GROUP), qw)
    if columns == 8:
        tensors, options = gptq(qw), {"weight_format": WoqWeightFormat.GPTQ_FORMAT}
        assert_same(read_tensors(tensors, WoqWeightDtype.INT4, (N, columns), GROUP, **options), qw)
