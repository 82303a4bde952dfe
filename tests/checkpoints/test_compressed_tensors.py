import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.checkpoints.compressed_tensors import CompressedTensorsFormat
from ipex_quant.checkpoints.format import Int8Input
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.int8 import StaticActivation
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def config(weights, activations=None, targets=("Linear",), **options):
    group = {"targets": list(targets), "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **options}


def form(*args, **options):
    return CompressedTensorsFormat.from_config(config(*args, **options))


def ints(bits, group=None, **options):
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": True, **options}


def floats(strategy, **options):
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **options}


def words_of(fields, bits, dense):
    """int32 words of one row of fields, bit by bit."""
    per_word = 32 // bits
    words = [0] * (-(-len(fields) * bits // 32) if dense else -(-len(fields) // per_word))
    for index, value in enumerate(fields):
        at = index * bits if dense else 32 * (index // per_word) + bits * (index % per_word)
        for bit in range(bits):
            words[(at + bit) // 32] |= (value >> bit & 1) << (at + bit) % 32
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def packed(fields, bits, dense=True):
    return torch.tensor([words_of(row, bits, dense) for row in fields.tolist()], dtype=torch.int32)


def module(bits, group, rows=8, columns=64, **options):
    """Tensors of a random pack-quantized module and its weight; options: asymmetric, order, dense."""
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group is None else -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5).bfloat16()
    zeros = torch.full((rows, groups), 1 << (bits - 1))
    if options.get("asymmetric"):
        zeros = torch.randint(0, 1 << bits, zeros.shape, generator=generator)
    g_idx = torch.arange(columns) // (group or columns)
    if options.get("order"):
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    weight = (codes - zeros[:, g_idx]) * scales.float()[:, g_idx]
    dense = options.get("dense", True)
    tensors = {"weight_packed": packed(codes, bits, dense), "weight_scale": scales}
    tensors |= {"weight_shape": torch.tensor([rows, columns])}
    if options.get("asymmetric"):
        tensors["weight_zero_point"] = packed(zeros.t(), bits, dense).t().contiguous()
    if options.get("order"):
        tensors["weight_g_idx"] = g_idx.int()
    return tensors, weight


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("group", [None, 32, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers(bits, group, dense, asymmetric):
    rows = 32 if asymmetric else 8
    tensors, weight = module(bits, group, rows, asymmetric=asymmetric, dense=dense)
    qw = form(ints(bits, group)).read("m", tensors, (rows, 64))
    assert torch.equal(dequantize(qw), weight)
    assert qw.scheme.dtype == WoqWeightDtype["INT8" if bits > 6 else f"INT{bits}"]
    assert qw.scheme.symmetric != asymmetric


def test_the_order_of_groups():
    tensors, weight = module(4, 16, order=True)
    read = form(ints(4, 16, actorder="group")).read
    assert torch.equal(dequantize(read("m", tensors, (8, 64))), weight)
    plain, weight = module(4, 16)
    unordered = plain | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    assert torch.equal(dequantize(read("m", unordered, (8, 64))), weight)


@pytest.mark.parametrize("shape", [(1,), (6, 1), (6, 4)])
def test_plain_integers(shape):
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scales = torch.rand(shape) + 0.1
    args = {(1,): ints(8, strategy="tensor"), (6, 1): ints(8), (6, 4): ints(4, 16)}[shape]
    qw = form(args).read("m", {"weight": codes, "weight_scale": scales}, (6, 64))
    spread = scales if len(shape) == 1 else scales.repeat_interleave(64 // shape[1], 1)
    assert torch.equal(dequantize(qw), codes * spread)
    if args["num_bits"] == 8:
        assert qw.scheme == WeightScheme(WoqWeightDtype.INT8, True, -1)


@pytest.mark.parametrize(
    ("args", "scales", "rows", "columns"),
    [
        (floats("tensor"), (1,), 6, 64),
        (floats("channel"), (6, 1), 1, 64),
        (floats("block", block_structure=[4, 32]), (2, 2), 4, 32),
    ],
)
def test_plain_floats(args, scales, rows, columns):
    codes, scales = torch.randn(6, 64).to(torch.float8_e4m3fn), torch.rand(scales) + 0.1
    grid = scales.reshape(1, 1) if scales.dim() == 1 else scales
    spread = grid.repeat_interleave(rows, 0)[:6].repeat_interleave(columns, 1)
    qw = form(args).read("m", {"weight": codes, "weight_scale": scales.bfloat16()}, (6, 64))
    assert torch.equal(dequantize(qw), codes.float() * spread.bfloat16().float())


def test_scales_that_are_exponents():
    codes, exponents = torch.randn(6, 64).to(torch.float8_e4m3fn), torch.randint(120, 130, (6, 2), dtype=torch.uint8)
    args = floats("group", group_size=32, scale_dtype="torch.uint8")
    qw = form(args).read("m", {"weight": codes, "weight_scale": exponents}, (6, 64))
    assert torch.equal(dequantize(qw), codes.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1))


@pytest.mark.parametrize("group", [16, 32])
def test_four_bit_floats(group):
    codes = torch.randint(0, 16, (6, 64))
    tensors = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)}
    if group == 16:
        scales = (torch.rand(6, 4) * 100 + 1).to(torch.float8_e4m3fn)
        tensors |= {"weight_scale": scales, "weight_global_scale": torch.tensor([448.0])}
        factors = scales.float() / 448
    else:
        tensors["weight_scale"] = torch.randint(120, 130, (6, 2), dtype=torch.uint8)
        factors = torch.exp2(tensors["weight_scale"].float() - 127)
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group" if group == 16 else "group", "group_size": group}
    qw = form(args).read("m", tensors, (6, 64))
    expected = E2M1[codes] * factors.repeat_interleave(group, 1)
    torch.testing.assert_close(dequantize(qw), expected, rtol=2e-7 if group == 16 else 0, atol=0)
    assert qw.scheme == WeightScheme(WoqWeightDtype.FP4, True, group, super_group_size=-1 if group == 16 else None)
    if group == 16:
        stored = (qw.scales / qw.super_scales).to(torch.float8_e4m3fn)
        assert torch.equal(stored.view(torch.uint8), scales.view(torch.uint8))


DYNAMIC = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
STATIC = {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"}
W8 = {"weight": torch.zeros(6, 64, dtype=torch.int8), "weight_scale": torch.ones(6, 1)}
INPUT = {"input_scale": torch.tensor([0.5]), "input_zero_point": torch.tensor([-3], dtype=torch.int8)}


@pytest.mark.parametrize(
    ("weights", "activations", "tensors", "expected"),
    [
        (ints(8), DYNAMIC, W8, Int8Input()),
        (ints(8), STATIC, W8 | INPUT, Int8Input(StaticActivation(0.5, 125))),
        (ints(8), STATIC, W8 | {"input_scale": torch.tensor(0.25)}, Int8Input(StaticActivation(0.25, 128))),
        (ints(8), None, W8, None),
        (ints(4, 32), DYNAMIC, W8, None),
        (ints(8), DYNAMIC | {"num_bits": 4}, W8, None),
        (floats("channel"), floats("token"), W8 | {"weight": torch.zeros(6, 64).to(torch.float8_e4m3fn)}, None),
    ],
)
def test_activations_of_eight_bits(weights, activations, tensors, expected):
    assert form(weights, activations).int8_input("m", tensors) == expected


def test_groups_have_names_patterns_or_classes():
    tensors = {bits: module(bits, 16)[0] for bits in (2, 4, 8)}
    groups = {
        "all": {"targets": ["Linear"], "weights": ints(4, 16)},
        "some": {"targets": ["re:.*up_proj"], "weights": ints(2, 16)},
        "one": {"targets": ["a.down_proj"], "weights": ints(8, 16)},
    }
    read = CompressedTensorsFormat.from_config({"config_groups": groups}).read
    for name, bits in {"a.q_proj": 4, "a.up_proj": 2, "a.down_proj": 8}.items():
        assert torch.equal(dequantize(read(name, tensors[bits], (8, 64))), module(bits, 16)[1])
    with pytest.raises(ValueError, match="no target of config_groups matches"):
        form(ints(4, 16), targets=["re:other"]).read("m", tensors[4], (8, 64))


def test_a_checkpoint_with_float_modules_and_cache_scales():
    tensors, _ = module(4, 16)
    state = {f"l.self_attn.q_proj.{key}": tensor for key, tensor in tensors.items()}
    others = {"lm_head.weight": torch.ones(4, 4), "l.self_attn.o_proj.weight": torch.ones(4, 4)}
    scales = {"l.self_attn.k_scale": torch.ones(1), "l.self_attn.v_scale": torch.ones(1)}
    checkpoint = open_checkpoint((state | others | scales, config(ints(4, 16))))
    assert list(checkpoint) == ["l.self_attn.q_proj"]
    assert checkpoint.other_tensors().keys() == others.keys()
    assert checkpoint.quantized_weight("lm_head") is None
    del state["l.self_attn.q_proj.weight_packed"]
    with pytest.raises(ValueError, match=r"^l\.self_attn\.q_proj\.weight_packed: missing"):
        open_checkpoint((state | others, config(ints(4, 16))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (config(ints(9)), r"num_bits: expected 2\.\.8, got 9"),
        (config(ints(True)), r"num_bits: expected 2\.\.8, got True"),
        (config(ints(8, type="str")), "type: expected 'int' or 'float'"),
        (config(ints(8, strategy="token")), "strategy: expected one of"),
        (config(ints(8, strategy="group")), "group_size: expected a size, got None"),
        (config(ints(8, 0)), "group_size: expected a size, got 0"),
        (config(floats("block")), "block_structure: expected two sizes"),
        (config(floats("block", block_structure=[0, 128])), "block_structure: expected two sizes"),
        (config(None), "expected weights with a scheme, got None"),
        (config(ints(8), targets=["re:("]), "is not a regular expression"),
        (config(ints(8)) | {"config_groups": {}}, "config_groups: expected groups"),
        (config(ints(8)) | {"config_groups": {"a": 3}}, "expected a scheme, got 3"),
        (config(ints(8)) | {"config_groups": {"a": {"targets": "Linear"}}}, "targets: expected names"),
        (config(ints(8), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: expected none"),
        (config(ints(8), transform_config={"u": {}}), "transform_config: expected none; rotations"),
    ],
)
def test_configurations_that_are_not_supported(changed, message):
    with pytest.raises(ValueError, match=message):
        CompressedTensorsFormat.from_config(changed)


def test_tensors_that_do_not_fit():
    tensors, _ = module(4, 16)
    read = form(ints(4, 16)).read
    with pytest.raises(ValueError, match=r"weight_shape: expected \[8, 32\], got \[8, 64\]"):
        read("m", tensors, (8, 32))
    with pytest.raises(ValueError, match=r"weight_packed: expected shape \[8, 8\], got \[8, 7\]"):
        read("m", tensors | {"weight_packed": tensors["weight_packed"][:, :7]}, (8, 64))
    with pytest.raises(TypeError, match=r"weight_packed: expected dtype torch.int32, got torch.int64"):
        read("m", tensors | {"weight_packed": tensors["weight_packed"].long()}, (8, 64))
    with pytest.raises(ValueError, match=r"weight_scale: expected shape \[8, 4\], got \[8, 1\]"):
        read("m", tensors | {"weight_scale": torch.ones(8, 1)}, (8, 64))
    with pytest.raises(ValueError, match=r"weight_zero_point: expected shape"):
        read("m", tensors | {"weight_zero_point": torch.zeros(3, 4, dtype=torch.int32)}, (8, 64))
    with pytest.raises(ValueError, match=r"weight_g_idx: expected shape \[64\]"):
        read("m", tensors | {"weight_g_idx": torch.zeros(63, dtype=torch.int32)}, (8, 64))
    with pytest.raises(ValueError, match="weight_scale: missing"):
        read("m", {"weight_packed": tensors["weight_packed"], "weight_shape": tensors["weight_shape"]}, (8, 64))
    with pytest.raises(ValueError, match="20 fields of 3 bits take 2 words padded and unpadded"):
        form(ints(3)).read("m", module(3, None, columns=20)[0], (8, 20))
    with pytest.raises(TypeError, match="weight: expected dtype"):
        read("m", {"weight": torch.zeros(8, 64), "weight_scale": torch.ones(8, 4)}, (8, 64))
    fp4 = {"weight_packed": torch.zeros(8, 32, dtype=torch.uint8), "weight_global_scale": torch.zeros(1)}
    fp4["weight_scale"] = torch.ones(8, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="weight_global_scale: expected a number above 0"):
        read("m", fp4, (8, 64))
