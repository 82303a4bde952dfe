import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.numerics.affine import dequantize

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
CONFIG = {"quant_method": "mxfp4"}
EXPERTS = "model.layers.0.mlp.experts"


def stack(experts, rows, columns, seed=0):
    """Blocks, scales and the weights they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (experts, rows, columns), generator=generator)
    scales = torch.randint(120, 130, (experts, rows, columns // 32), generator=generator)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(-1, (-1, 16))
    weight = VALUES[codes] * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    return blocks, scales.to(torch.uint8), weight


@pytest.fixture
def parts():
    return {"gate_up": stack(3, 8, 64), "down": stack(3, 64, 32, 1)}


def state_of(parts):
    state = {}
    for part, (blocks, scales, _) in parts.items():
        state |= {f"{EXPERTS}.{part}_proj_blocks": blocks, f"{EXPERTS}.{part}_proj_scales": scales}
    return state | {f"{EXPERTS}.gate_up_proj_bias": torch.arange(24.0).view(3, 8), "model.norm.weight": torch.ones(2)}


def test_experts_one_by_one(parts):
    checkpoint = open_checkpoint((state_of(parts), CONFIG))
    assert len(checkpoint) == 9
    for expert in range(3):
        rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
        for part in ("gate", "up", "down"):
            weight, bias = checkpoint[f"{EXPERTS}.{expert}.{part}_proj"]
            own = parts["down"][2][expert] if part == "down" else parts["gate_up"][2][expert][rows[part]]
            assert torch.equal(dequantize(weight), own)
            expected = None if part == "down" else torch.arange(24.0).view(3, 8)[expert][rows[part]]
            assert bias is expected or torch.equal(bias, expected)
    assert checkpoint.other_tensors().keys() == {"model.norm.weight"}


def test_tensors_that_do_not_fit(parts):
    name = f"{EXPERTS}.down_proj"
    state = state_of(parts)
    state[f"{name}_scales"] = state[f"{name}_scales"].clone()
    state[f"{name}_scales"][1, 0, 0] = 255
    checkpoint = open_checkpoint((state, CONFIG))
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj\.scales: expected exponents below 255"):
        checkpoint[f"{EXPERTS}.1.down_proj"]
    state[f"{name}_scales"] = state[f"{name}_scales"][:, :5]
    with pytest.raises(ValueError, match=r"scales: expected shape \[64, 1\], got \[5, 1\]"):
        open_checkpoint((state, CONFIG))[f"{EXPERTS}.0.down_proj"]
    del state[f"{name}_scales"]
    with pytest.raises(ValueError, match="scales: missing"):
        open_checkpoint((state, CONFIG))[f"{EXPERTS}.0.down_proj"]
    with pytest.raises(ValueError, match="down_proj_blocks: expected a stack of experts"):
        open_checkpoint((state | {f"{name}_blocks": torch.zeros(2**40, 0, 1, 16, dtype=torch.uint8)}, CONFIG))
