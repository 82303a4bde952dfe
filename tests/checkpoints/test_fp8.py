import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.checkpoints.fp8 import Fp8Format
from ipex_quant.numerics.affine import dequantize

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 64]}
ROWS = {"quant_method": "fp8", "format": "float8_e4m3fn", "weight_scale_semantics": "inverse"}


def tensors(rows, columns, *scales):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale_inv": torch.rand(scales, generator=generator) + 0.5}


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (130, 200), (5, 30)])
def test_the_scale_of_a_block_multiplies_each_value(rows, columns):
    stored = tensors(rows, columns, -(-rows // 128), -(-columns // 64))
    expected = stored["weight"].float()
    for n in range(rows):
        for k in range(columns):
            expected[n, k] *= stored["weight_scale_inv"][n // 128, k // 64]
    qw = Fp8Format.from_config(BLOCKS).read("m", stored, (rows, columns))
    assert torch.equal(dequantize(qw), expected)


def test_gptqmodels_scales_divide():
    stored = tensors(6, 20, 6)
    qw = Fp8Format.from_config(ROWS).read("m", stored, (None, None))
    expected = stored["weight"].float() / stored["weight_scale_inv"][:, None]
    torch.testing.assert_close(dequantize(qw), expected, rtol=1e-6, atol=0)


def test_one_scale_for_all():
    stored = tensors(6, 20, 1)
    expected = stored["weight"].float() * stored["weight_scale_inv"]
    assert torch.equal(dequantize(Fp8Format.from_config({}).read("m", stored, (6, 20))), expected)


def test_a_weight_alone_is_a_float_one():
    form = Fp8Format.from_config(BLOCKS)
    assert not form.quantizes({"weight"})
    assert form.quantizes({"weight", "weight_scale_inv"})
    assert form.quantizes({"weight_scale_inv"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fmt": "e5m2"}, "fmt: expected 'e4m3', got 'e5m2'"),
        ({"weight_scale_semantics": "x"}, "weight_scale_semantics: expected 'inverse' or none"),
        ({"weight_block_size": [128]}, "weight_block_size: expected two sizes"),
        ({"weight_block_size": [0, 128]}, "weight_block_size: expected two sizes"),
        ({"weight_block_size": 128}, "weight_block_size: expected two sizes, got 128"),
    ],
)
def test_configurations_that_are_not_supported(config, message):
    with pytest.raises(ValueError, match=message):
        Fp8Format.from_config(config)


def test_tensors_that_do_not_fit():
    form = Fp8Format.from_config(BLOCKS)
    good = tensors(256, 128, 2, 2)
    with pytest.raises(ValueError, match=r"weight_scale_inv: expected shape \[2, 2\], got \[2, 3\]"):
        form.read("m", good | {"weight_scale_inv": torch.ones(2, 3)}, (256, 128))
    with pytest.raises(ValueError, match=r"weight: expected shape \[256, 64\]"):
        form.read("m", good, (256, 64))
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float8_e4m3fn, got torch\.int8"):
        form.read("m", good | {"weight": good["weight"].view(torch.int8)}, (256, 128))
    with pytest.raises(ValueError, match="nothing tells whether it multiplies or divides"):
        Fp8Format.from_config({}).read("m", tensors(6, 20, 6), (6, 20))
    with pytest.raises(ValueError, match="scales: expected finite values"):
        Fp8Format.from_config(ROWS).read("m", good | {"weight_scale_inv": torch.zeros(256)}, (256, 128))


def test_exponents_are_scales():
    stored = tensors(256, 128, 2, 2)
    stored["weight_scale_inv"] = torch.tensor([[126, 127], [128, 129]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    factors = torch.tensor([[0.5, 1.0], [2.0, 4.0]]).repeat_interleave(128, 0).repeat_interleave(64, 1)
    qw = Fp8Format.from_config(BLOCKS).read("m", stored, (256, 128))
    assert torch.equal(dequantize(qw), stored["weight"].float() * factors)


def stacks(experts=2, hidden=64, width=128, scale=None):
    """Stacked experts, and the tensors that each part should have."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
    state, expected = {"experts.router.weight": torch.zeros(2, 2)}, {}
    for part, (rows, columns) in shapes.items():
        weight = torch.randn(experts, rows, columns, generator=generator).to(torch.float8_e4m3fn)
        factors = torch.rand(experts, *(scale or (-(-rows // 128), -(-columns // 64))), generator=generator)
        state |= {f"experts.{part}_proj": weight, f"experts.{part}_proj_scale_inv": factors}
        for expert in range(experts):
            for number, own in enumerate(("gate", "up") if part == "gate_up" else ("down",)):
                size, blocks = (
                    rows // (2 if part == "gate_up" else 1),
                    factors.shape[1] // (2 if part == "gate_up" else 1),
                )
                part_scales = factors[expert]
                if scale is None:
                    part_scales = part_scales[number * blocks : (number + 1) * blocks]
                expected[f"experts.{expert}.{own}_proj"] = (
                    weight[expert, number * size : (number + 1) * size],
                    part_scales,
                )
    return state, expected


@pytest.mark.parametrize("scale", [None, (1, 1)])
def test_stacked_experts_are_taken_apart(scale):
    state, expected = stacks(scale=scale)
    checkpoint = open_checkpoint((state, BLOCKS))
    assert set(checkpoint) == set(expected)
    assert set(checkpoint.other_tensors()) == {"experts.router.weight"}
    for name, (weight, factors) in expected.items():
        rows, columns = weight.shape
        spread = (
            factors.repeat_interleave(128, 0).repeat_interleave(64, 1)[:rows, :columns] if scale is None else factors
        )
        assert torch.equal(dequantize(checkpoint[name][0]), weight.float() * spread)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 96}, "blocks go across gate and up, of 96 rows each"), ({"experts": 0}, "expected a stack of experts")],
)
def test_stacks_that_cannot_be_taken_apart(options, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoint((stacks(**options)[0], BLOCKS))
