import pytest
import torch

from ipex_quant.checkpoints.ipex_default import IpexDefaultFormat
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

UNKNOWN = (None, None)


def _default_tensors(module, pack_column, dim: int) -> dict[str, torch.Tensor]:
    """The API document's tensors for the codes of a GPTQ module, packed along `dim`."""

    def pack(values: torch.Tensor) -> torch.Tensor:
        values = values if dim == 1 else values.t()
        packed = torch.tensor([pack_column(row, 4) for row in values.tolist()], dtype=torch.int32)
        return packed if dim == 1 else packed.t().contiguous()

    scale = module.tensors["scales"].t().contiguous()
    return {"packed_weight": pack(module.codes), "scale": scale, "packed_zp": pack(module.zero_points)}


@pytest.mark.parametrize("group_size", [-1, 8, 32])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(16, 64), (64, 64), (24, 72), (7, 13)])
def test_reads_both_packings(shape, dim, group_size, make_gptq_module, pack_column):
    module = make_gptq_module(4, *shape, group_size, v2=True)
    qw = IpexDefaultFormat().read("m", _default_tensors(module, pack_column, dim), shape)
    assert torch.equal(dequantize(qw), module.weight)


def test_without_expected_shape_it_is_the_documents_layout(make_gptq_module, pack_column):
    module = make_gptq_module(4, 16, 64, 32, v2=True)
    qw = IpexDefaultFormat().read("m", _default_tensors(module, pack_column, 1), UNKNOWN)
    assert qw.shape == (16, 64)
    assert qw.scheme == WeightScheme(WoqWeightDtype.INT4, False, 32)
    assert torch.equal(dequantize(qw), module.weight)


@pytest.mark.parametrize("shape", [(32, 64), (64, 64)])
def test_gptq_tensors_under_other_names_are_recognized(shape, make_gptq_module):
    form = IpexDefaultFormat.from_config({"weight_key": "w", "scale_key": "s", "zero_point_key": "z"})
    module = make_gptq_module(4, *shape, 32, act_order=True)
    names = {"qweight": "w", "scales": "s", "qzeros": "z", "g_idx": "g_idx"}
    qw = form.read("m", {names[key]: tensor for key, tensor in module.tensors.items()}, shape)
    assert torch.equal(dequantize(qw), module.weight)


def test_g_idx_is_kept(make_gptq_module, pack_column):
    module = make_gptq_module(4, 16, 64, 32, v2=True, act_order=True)
    tensors = _default_tensors(module, pack_column, 1) | {"g_idx": module.tensors["g_idx"]}
    assert torch.equal(dequantize(IpexDefaultFormat().read("m", tensors, (16, 64))), module.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed_zp": None}, "packed_zp: missing"),
        (
            {"packed_weight": torch.zeros(16, 7, dtype=torch.int32)},
            r"packed_weight: expected shape \[16, 8\] .* \[16, 7\]",
        ),
        ({"packed_weight": torch.zeros(16, dtype=torch.int32)}, "packed_weight: expected 2 dimensions"),
        ({"packed_zp": torch.zeros(16, 2, dtype=torch.int32)}, r"packed_zp: expected shape \[16, 1\], got \[16, 2\]"),
        ({"scale": torch.ones(15, 2)}, r"packed_weight: expected shape .* got \[16, 8\] with scale \[15, 2\]"),
        ({"scale": torch.ones(16, 5)}, "scales: 5 groups do not fit in_features 64"),
        ({"scale": torch.full((16, 2), float("inf"))}, "scales: expected finite values"),
        ({"g_idx": torch.zeros(3, dtype=torch.int32)}, r"g_idx: expected shape \[64\], got \[3\]"),
    ],
)
def test_inconsistent_tensors_raise(changes, message, make_gptq_module, pack_column):
    tensors = _default_tensors(make_gptq_module(4, 16, 64, 32, v2=True), pack_column, 1) | changes
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        IpexDefaultFormat().read("m", tensors, (16, 64))


def test_another_dtype_raises(make_gptq_module, pack_column):
    tensors = _default_tensors(make_gptq_module(4, 16, 64, 32, v2=True), pack_column, 1)
    for key in tensors:
        with pytest.raises(TypeError, match=f"{key}: expected dtype"):
            IpexDefaultFormat().read("m", tensors | {key: tensors[key].to(torch.int16)}, (16, 64))


def test_key_config_is_checked():
    assert IpexDefaultFormat.from_config({"bias_key": "b"}).bias_key == "b"
    with pytest.raises(ValueError, match=r"expected only keys of .* got \['weights_key'\]"):
        IpexDefaultFormat.from_config({"weights_key": "w"})
    with pytest.raises(ValueError, match="scale_key: expected the name of a tensor, got 3"):
        IpexDefaultFormat.from_config({"scale_key": 3})
